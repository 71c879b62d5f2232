import re

import progressive_pruning

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


def test_two_alternating_trainings(tmp_path, capsys):
    progressive_pruning.main(["digits_resnet", *TINY, "--out", str(tmp_path)])
    assert re.search(r"sparse training: \d+\.\d\d times faster", capsys.readouterr().out)
    plain, pruned = (progressive_pruning.results(tmp_path / str(index)) for index in (0, 1))
    assert len(plain["epochs"]) == len(pruned["epochs"]) == 3 and not plain["pruned"]
    assert all(step[0] in (1, 2) for step in pruned["pruned"])
