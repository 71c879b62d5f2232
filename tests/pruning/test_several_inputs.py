"""Models with several arguments, keyword arguments, and inputs that are not tensors of floats."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekit

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(4, 3, 16, 16, generator=GENERATOR)
TOKENS = torch.randint(0, 40, (4, 6), generator=GENERATOR)


class Captions(nn.Module):
    """Images and tokens, compared as in CLIP (Radford et al., ICML 2021)."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.Conv2d(width, 8, 3))
        self.embedding = nn.Embedding(40, width)
        self.text = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 8))

    def forward(self, images, tokens, mask=None, normalize=False):
        words = self.text(self.embedding(tokens))
        mask = torch.ones(tokens.shape) if mask is None else mask
        text = (words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        image = self.stem(images).mean((2, 3))
        if normalize:
            image = F.normalize(image, dim=-1)
        return {"scores": image @ text.T, "image": image}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Captions().eval()


def prune(model, example, **options):
    options = {"importance": "magnitude", "pruning_ratio": 0.5, **options}
    return prunekit.Pruner(model, example, **options).step()


MASK = (torch.arange(6) < torch.tensor([[6], [4], [5], [3]])).long()
EXAMPLES = {
    "arguments": (IMAGES, TOKENS),
    "keywords": {"images": IMAGES, "tokens": TOKENS},
    "mask": {"images": IMAGES, "tokens": TOKENS, "mask": MASK, "normalize": True},
    "booleans": (IMAGES, TOKENS, MASK.bool()),
    "one input": (IMAGES[:1], TOKENS[:1]),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_all_inner_channels_are_pruned(model, name):
    example = EXAMPLES[name]
    slim, report = prune(model, example, global_pruning=False)
    assert report.equivalence.passed
    widths = slim.stem[0].out_channels, slim.text[0].in_features, slim.text[0].out_features
    assert widths == (8, 8, 16)
    assert slim(IMAGES[:2], TOKENS[:2])["scores"].shape == (2, 2)
    assert report.after.params == sum(tensor.numel() for tensor in slim.parameters())
    inputs = report.equivalence.inputs[0]
    assert [2, 3, 16, 16] in inputs and [2, 6] in inputs


def test_a_wrong_cut_is_found_with_several_inputs(model, monkeypatch):
    from prunekit.pruning.surgery import slim as module

    transfer = module.check_all

    def damaged(masked, slimmed, inputs, noise):
        slimmed.text[0].bias.data[0] += 1e-3
        return transfer(masked, slimmed, inputs, noise)

    monkeypatch.setattr(module, "check_all", damaged)
    with pytest.raises(prunekit.PrunekitError, match="is not equivalent"):
        prune(model, (IMAGES, TOKENS))


def test_target_and_several_steps(model):
    example = EXAMPLES["keywords"]
    pruner = prunekit.Pruner(model, example, importance="magnitude", target={"params_ratio": 0.5}, steps=2)
    pruner.step()
    slim, report = pruner.step()
    assert report.after.params <= 0.52 * sum(tensor.numel() for tensor in model.parameters())
    assert prunekit.count(slim, example).macs == report.after.macs


def test_save_and_load_build_the_model_with_its_arguments(model, tmp_path):
    slim, _ = prune(model, EXAMPLES["mask"])
    prunekit.save(slim, tmp_path / "slim.prunekit", builder=Captions)
    loaded = prunekit.load(tmp_path / "slim.prunekit", builder=Captions)
    torch.testing.assert_close(loaded(IMAGES, TOKENS), slim.eval()(IMAGES, TOKENS))


def test_a_model_of_tokens_is_saved(tmp_path):
    torch.manual_seed(0)

    def build():
        return nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))

    slim, _ = prune(build(), TOKENS)
    prunekit.save(slim, tmp_path / "slim.prunekit", builder=build)
    loaded = prunekit.load(tmp_path / "slim.prunekit", builder=build)
    torch.testing.assert_close(loaded(TOKENS), slim.eval()(TOKENS))


def test_missing_arguments_are_named(model):
    with pytest.raises(prunekit.PrunekitError, match="missing 1 required positional argument: 'tokens'"):
        prune(model, IMAGES)


class Detector(nn.Module):
    """Takes a list of images of different sizes, as torchvision's detectors do."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))

    def forward(self, images):
        return [{"boxes": self.body(image[None]).mean((2, 3))} for image in images]


def test_a_list_of_images_is_one_argument():
    torch.manual_seed(0)
    images = [torch.randn(3, 12, 12), torch.randn(3, 16, 20)]
    slim, report = prune(Detector(), (images,))
    assert report.equivalence.passed and slim.body[0].out_channels == 8
