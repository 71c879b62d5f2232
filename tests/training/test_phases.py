import pytest

from prunekit.config.schema import Training
from prunekit.errors import TrainingError
from prunekit.training.phases import Phase, Phases

PROGRESSIVE = {"sizes": [8, 12, 16], "milestones": [0.5, 0.75], "batch_sizes": [12, 6, 4], "strengths": [0, 0.5, 1]}


def phases(epochs=4, images=25, micro_batches=1, batch_size=4, **progressive):
    return Phases(Training(epochs=epochs, batch_size=batch_size, progressive=progressive), 16, images, micro_batches)


def test_one_phase_counts_steps():
    one = phases(epochs=3, batch_size=6)
    assert one.at(0) == one.at(2) == one.last == Phase(0, 16, 6, 4, None)
    assert one.sizes == [16] and one.total_steps == one.total == 12
    assert [one.done(epoch, step) for epoch in range(3) for step in range(4)] == list(range(12))
    assert list(one.shares()) == [step / 12 for step in range(12)]


def test_size_batch_and_strength_of_each_epoch():
    found = phases(**PROGRESSIVE)
    assert [(p.size, p.batch_size, p.steps, p.strength) for p in map(found.at, range(5))] == [
        (8, 12, 2, 0.0),
        (8, 12, 2, 0.0),
        (12, 6, 4, 0.5),
        (16, 4, 6, 1.0),
        (16, 4, 6, 1.0),  # after the end
    ]
    assert [found.steps_before(epoch) for epoch in range(5)] == [0, 2, 4, 8, 14] and found.total_steps == 14


def test_every_epoch_is_the_same_share_of_the_training():
    found = phases(**PROGRESSIVE)
    shares = list(found.shares())
    assert shares == [0, 1 / 8, 1 / 4, 3 / 8, *(1 / 2 + n / 16 for n in range(4)), *(3 / 4 + n / 24 for n in range(6))]
    steps = [found.parts_of_a_step(epoch) for epoch in range(4) for _ in range(found.at(epoch).steps)]
    assert sum(steps) == found.total == found.done(4, 0)


def test_batches_are_at_most_the_set():
    found = phases(images=25, micro_batches=4, **PROGRESSIVE)
    assert [found.at(epoch).batch_size for epoch in (0, 2, 3)] == [6, 6, 4]
    assert [found.at(epoch).steps for epoch in (0, 2, 3)] == [1, 1, 1]
    with pytest.raises(TrainingError, match="3 images are too few for the 4 batches of a step"):
        phases(images=3, micro_batches=4)


def test_no_epochs():
    none = phases(epochs=0, sizes=[8, 16])
    assert none.total_steps == 0 and none.total == 1 and not list(none.shares()) and none.at(0).size == 16
