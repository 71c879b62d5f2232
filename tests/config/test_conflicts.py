"""Sections ``progressive`` that do not fit the rest of a recipe; other conflicts are tested where they matter."""

import pytest

from prunekit.config.recipe import load
from prunekit.config.registry import augmentations
from prunekit.errors import RecipeError

# Of ``csnet``: size 64, batches of 16, 12 epochs, augmentation crop_flip.
FITTING = "sizes: [32, 48, 64]"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("sizes: [48, 32, 64]", "sizes: [48, 32, 64] does not increase; write [32, 48, 64]"),
        ("sizes: [32, 32, 64]", "sizes: [32, 32, 64] does not increase; write [32, 64]"),
        ("sizes: [32, 96]", "sizes: [32, 96] does not end with data.size=64, at which the model is evaluated; write "),
        ("sizes: [0, 64]", "sizes[0]: 0 must be greater than or equal to 1"),
        (f"{FITTING}, milestones: [0.5]", "milestones: [0.5] needs a share for each size but the first, 2 in all"),
        (f"{FITTING}, milestones: [0.8, 0.5]", "milestones: [0.8, 0.5] does not increase; write [0.5, 0.8]"),
        (f"{FITTING}, milestones: [0.5, 1]", "milestones[1]: 1 must be less than 1"),
        (
            f"{FITTING}, milestones: [0.5, 0.51]",
            "milestones: of 12 epochs, size 48 gets none; raise train.epochs, or set train.progressive.sizes=[]",
        ),
        ("sizes: [8, 16, 24, 32, 40, 41, 42, 43, 44, 45, 46, 47, 64]", "sizes: of 12 epochs, size 42 gets none"),
        (f"{FITTING}, batch_sizes: [16]", "batch_sizes: [16] needs a batch size for each of the 3 sizes"),
        (
            f"{FITTING}, batch_sizes: [32, 32, 8]",
            "batch_sizes: [32, 32, 8] does not end with train.batch_size=16; write it last, or set train.batch_size=8",
        ),
        (f"{FITTING}, strengths: [0.5]", "strengths: [0.5] needs a factor for each of the 3 sizes"),
        (f"{FITTING}, strengths: [0.5, 1, 2]", "strengths[2]: 2 must be less than or equal to 1"),
    ],
)
def test_progressive_sizes_that_do_not_fit(section, words):
    with pytest.raises(RecipeError) as error:
        load("csnet", [f"train.progressive={{{section}}}"])
    (line,) = str(error.value).splitlines()
    assert f"train.progressive.{words}" in line


def test_all_conflicts_are_reported_at_once():
    train = "train.progressive={sizes: [48, 32, 64], milestones: [0.5], batch_sizes: [8], strengths: [1]}"
    with pytest.raises(RecipeError) as error:
        load("csnet", [train, "finetune.epochs=3", "finetune.progressive.sizes=[32, 96]"])
    keys = [line.partition("}': ")[2].partition(": ")[0] for line in str(error.value).splitlines() if "}" in line]
    assert keys == [f"train.progressive.{key}" for key in ("sizes", "milestones", "batch_sizes", "strengths")]
    wrong = "finetune.progressive.sizes: [32, 96] does not end with data.size=64, at which the model is evaluated"
    assert f"{wrong}; write [32, 64], or set data.size=96" in str(error.value)


def test_an_augmentation_without_strength_is_refused(monkeypatch):
    section = "train.progressive={sizes: [32, 64], strengths: [0.5, 1]}"
    with pytest.raises(RecipeError, match="strengths: augmentation 'none' has no option strength; drop it"):
        load("csnet", [section, "train.augment=none"])
    load("csnet", [section])
    monkeypatch.setattr(augmentations, "_entries", dict(augmentations._entries))
    augmentations.register("any")(lambda images, targets, sizes, generator, **options: (images, targets))
    load("csnet", [section, "train.augment=any"])


def test_first_epochs_of_sizes():
    def first(section, epochs=12):
        return load("csnet", [f"train.progressive={{{section}}}"]).train.progressive.first_epochs(epochs)

    assert first(FITTING) == [0, 4, 8] and first("sizes: [64]") == [0]
    assert first(f"{FITTING}, milestones: [0.2, 0.9]") == [0, 2, 11]
    assert first(f"{FITTING}, milestones: [0.2, 0.9]", 215) == [0, 43, 194]
    # Without sizes, the other keys have no effect, as when a recipe's sizes are overridden.
    assert load("csnet", ["train.progressive={milestones: [0.5], batch_sizes: [1]}"]).train.progressive.sizes == []
