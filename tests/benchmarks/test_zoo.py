"""The zoo's worker on tiny networks; its libraries are not installed here."""

import pytest
import torch
import zoo
import zoo_networks
from torch import nn

from prunekit.backbones.resnet import resnet


class Refused(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x, dim=1).real.mean((2, 3))


def made(network):
    torch.manual_seed(0)
    model, images = network(), torch.randn(2, 3, 32, 32)
    zoo_networks.settle(model, images)
    return model.eval(), images


@pytest.mark.parametrize("tool", zoo.TOOLS)
def test_pruned_network(monkeypatch, tool):
    monkeypatch.setattr(zoo, "build", lambda *_: made(lambda: resnet(8)))
    result = zoo.worker("timm", "resnet8", tool, 0.4)
    assert result["status"] == "pruned" and 0.2 < result["gone"] < 0.8 and result["seconds"] > 0


def test_refusals_have_their_reasons(monkeypatch):
    narrow = lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), Refused())  # noqa: E731
    monkeypatch.setattr(zoo, "build", lambda *_: made(narrow))
    result = zoo.worker("timm", "odd", "prunekit", 0.4)
    assert result["status"] == "less than 20%" and any("fft" in reason for reason in result["reasons"])
    monkeypatch.setattr(zoo, "build", lambda *_: made(nn.Sequential))
    assert zoo.worker("timm", "empty", "prunekit", 0.4)["status"] == "failed"


def test_table_counts_each_status():
    results = [{"list": "timm", "tool": "prunekit", "status": s} for s in ("pruned", "pruned", "failed", "too large")]
    header, _, row = zoo.rows(results)
    cells = dict(zip(header, row, strict=True))
    assert (cells["networks"], cells["pruned"], cells["failed"], cells["time limit"]) == ("3", "2", "1", "0")
