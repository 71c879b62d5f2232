import io

import pytest
from helpers.small_run import BY_THRESHOLD
from PIL import Image
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

class Sides(UNet):
    def __init__(self, kind, last, always):
        super().__init__(True)
        self.side, self.kind, self.last, self.always = nn.Conv2d(4, 1, 1), kind, last, always

    def forward(self, x):
        main, side = super().forward(x), self.side(self.deep(self.down(x)))
        kinds = {
            "tuple": tuple,
            "list": list,
            "dict": lambda ts: dict(enumerate(ts)),
            "nested": lambda ts: [(t,) for t in ts],
        }
        outputs = kinds[self.kind](self.last(output) for output in (main, side))
        return outputs if self.always or self.training else outputs[0]

def sides(kind: str = "tuple", last: str = "identity", always: bool = True):
    last = {"identity": lambda x: x, "sigmoid": torch.sigmoid, "hard": nn.functional.hardsigmoid}[last]
    return Sides(kind, last, always)
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
        if any("name: folder" in text for text in overrides):
            data = data[2:]
        recipe = load("csnet", [*BY_THRESHOLD, backbone, *data, *overrides])
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


def test_progressive_sizes_that_the_backbone_cannot_take_are_reported_at_once(check):
    sizes = ["train.progressive.sizes=[6, 8, 10, 16]", "train.epochs=4", "finetune.progressive.sizes=[9, 16]"]
    with pytest.raises(RecipeError) as error:
        check(*sizes, "finetune.epochs=2")
    assert [line.rpartition("; ")[2] for line in str(error.value).splitlines()] == [
        "in train.progressive.sizes, replace 6 by 4 or 8 (a multiple of 4)",
        "in train.progressive.sizes, replace 10 by 8 or 12 (a multiple of 4)",
        "in finetune.progressive.sizes, replace 9 by 8 or 12 (a multiple of 4)",
    ]
    assert check("train.progressive.sizes=[8, 16]", "train.epochs=4") == ""


def test_a_batch_larger_than_the_set_is_reported(check):
    assert "batch_size" not in check() and "batch_size" not in check("finetune.batch_size=4")
    said = check("finetune.batch_size=5")
    assert "finetune.batch_size=5 is larger than the 4 training images: an epoch is one step" in said
    assert "batch_size" not in check("finetune.batch_size=5", "finetune.epochs=0")
    progressive = "train.progressive={sizes: [8, 16], batch_sizes: [9, 2]}"
    assert "train.progressive.batch_sizes=9 is larger than the 4 training images" in check(progressive)


def test_a_threshold_without_effect_is_reported(check):
    assert "no effect" not in check("target.params_ratio=0.5")
    reported = check("target.params_ratio=0.5", "slim.threshold=0.02")
    assert "slim.threshold=0.02 has no effect with target.params_ratio; to prune by threshold, set" in reported
    assert "no effect" not in check("target.params_ratio=null", "slim.threshold=0.02")


def test_too_little_memory_is_not_a_wrong_size(check, monkeypatch):
    monkeypatch.setattr(
        "torch.nn.Upsample.forward", failing(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    )
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        check()


@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
@pytest.mark.parametrize("always", ["true", "false"])
def test_side_outputs(check, kind, always):
    sides = ["backbone.name=sides", f"backbone.options={{kind: {kind}, always: {always}}}"]
    assert check(*sides) == check(*sides, "train.output_weights=[1, 0.5]") == ""
    with pytest.raises(RecipeError, match=r"^finetune\.output_weights has 3 weights, and the model returns 2 outputs"):
        check(*sides, "finetune.output_weights=[1, 1, 1]")


def test_outputs_that_no_loss_takes_are_refused_before_training(check):
    with pytest.raises(RecipeError, match=r"^train\.loss: task cannot be computed .*a tuple, list or dict of tensors$"):
        check("backbone.name=sides", "backbone.options={kind: nested, always: false}")


@pytest.mark.parametrize("last", ["sigmoid", "hard"])
@pytest.mark.parametrize("loss", ["task", "bce_iou"])
def test_probabilities_in_place_of_logits_are_reported(check, last, loss):
    said = check("backbone.name=sides", f"backbone.options.last={last}", f"train.loss={loss}")
    assert "backbone sides: its outputs lie between 0 and 1, but the loss expects logits; remove the sigmoid" in said
    assert "logits" not in check("backbone.name=sides", f"train.loss={loss}")


@pytest.mark.parametrize("level", [0, 255])
def test_masks_that_are_all_empty_or_full_are_reported(check, tmp_path, level):
    for part, picture in {"images": Image.new("RGB", (16, 16)), "GT": Image.new("L", (16, 16), level)}.items():
        (tmp_path / "data" / part).mkdir(parents=True)
        for number in range(4):
            picture.save(tmp_path / "data" / part / f"{number}.png")
    said = check(f"data={{name: folder, size: 16, root: {tmp_path / 'data'}, cache: none}}")
    kind = "full" if level else "empty"
    assert f"train: all 3 masks are {kind}; check" in said and f"val: all 1 masks are {kind}; check" in said
