import re

import shrinking

TINY = [
    "backbone.options={depth: 8, width: 8}",
    "train.epochs=3",
    "train.batch_size=128",
    "train.gate_lr=0.1",
    "decay={name: l1, weight: 1e-2}",
    "slim.threshold=0.1",
    "finetune.epochs=1",
    "finetune.batch_size=128",
]


def test_two_trainings_in_turns(tmp_path, capsys):
    shrinking.main(["digits_resnet", *TINY, "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert re.search(r"sparse stage: \d+\.\d\d times sooner", told)
    plain, cut = (shrinking.figures(tmp_path / str(me)) for me in (0, 1))
    assert len(plain["epochs"]) == len(cut["epochs"]) == 3 and not plain["cuts"]
    assert all(one[0] in (1, 2) for one in cut["cuts"])
