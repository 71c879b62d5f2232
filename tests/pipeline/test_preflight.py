import io

import pytest
from rich.console import Console

from prunekit.config.recipe import load
from prunekit.errors import RecipeError
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.preflight import check_recipe
from prunekit.utils.progress import Reporter

UNET = """
import torch
from torch import nn

class UNet(nn.Module):
    def __init__(self, skip):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.deep = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.up = nn.Upsample(scale_factor=2)
        self.head = nn.Conv2d(8 if skip else 4, 1, 1)
        self.skip = skip

    def forward(self, x):
        x = self.down(x)
        y = self.up(self.deep(x))
        return self.up(self.head(torch.cat([x, y], 1) if self.skip else y))

def unet(skip: bool = True):
    return UNet(skip)
"""


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.fixture
def check(tmp_path):
    (tmp_path / "unet.py").write_text(UNET)

    def check(*overrides):
        backbone = f"backbone={{name: unet, file: {tmp_path / 'unet.py'}}}"
        data = ["data.size=16", "data.options={train: 4, val: 2}", "train.batch_size=2", "finetune.batch_size=2"]
        recipe = load("csnet", [backbone, *data, *overrides])
        out = io.StringIO()
        check_recipe(RunContext(recipe, Reporter(Console(file=out, width=200))), load_data=True)
        return out.getvalue()

    return check


@pytest.mark.parametrize("skip", ["true", "false"])
@pytest.mark.parametrize(
    ("size", "advice"), [(30, r"28 or 32 \(a multiple of 4\)"), (17, r"16 or 20 \(a multiple of 4\)")]
)
def test_sizes_that_work_are_proposed(check, skip, size, advice):
    with pytest.raises(RecipeError, match=rf"backbone unet.*; set data\.size={advice}$"):
        check(f"backbone.options.skip={skip}", f"data.size={size}")
    check(f"backbone.options.skip={skip}", f"data.size={size // 4 * 4}")


def test_a_batch_larger_than_the_set_is_reported(check):
    assert "batch_size" not in check() and "batch_size" not in check("finetune.batch_size=4")
    said = check("finetune.batch_size=5")
    assert "finetune.batch_size=5 is larger than the 4 training images: an epoch is one step" in said
    assert "batch_size" not in check("finetune.batch_size=5", "finetune.epochs=0")


def test_too_little_memory_is_not_a_wrong_size(check, monkeypatch):
    monkeypatch.setattr(
        "torch.nn.Upsample.forward", failing(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    )
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        check()
