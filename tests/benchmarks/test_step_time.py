"""The comparison of times on tiny networks; the libraries of its networks are not installed here."""

import step_time
import torch
from torch import nn

from prunekit.backbones.resnet import resnet

ARGUMENTS = ["--repeats", "2", "--ratio", "0.4"]


def made(which, name):
    torch.manual_seed(0)
    return resnet(8).eval() if name == "resnet8" else nn.Sequential(nn.Flatten()), torch.randn(2, 3, 32, 32)


def test_ratios_and_failures(monkeypatch, capsys):
    monkeypatch.setattr(step_time.zoo_networks, "build", made)
    ((find, step),) = step_time.main(["resnet8", "timm/flat", *ARGUMENTS])
    assert find > 0 and step > 0
    *_, row, failed, last = capsys.readouterr().out.splitlines()
    assert row.startswith("| resnet8 |") and row.endswith(f"| {step:.2f} |")
    assert failed.startswith("| timm/flat | IndexError") and last.endswith(f"| {step:.2f} |")


def test_what_is_timed_prunes_all_but_the_classifier():
    for work in (step_time.find_and_cut, lambda *args: step_time.torch_pruning_step(*args, magnitude)):
        model = resnet(8).eval()
        before = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
        work(model, torch.randn(2, 3, 32, 32), 0.4)
        after = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
        assert all(a < b for a, b in zip(after, before, strict=True)) and model.classifier.out_features == 10


magnitude = step_time.tp.importance.GroupMagnitudeImportance()
