"""Where fvcore, thop and torch count what we count, and where they do not; the README explains each difference."""

import copy
import logging
import warnings

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from helpers.networks import small_csnet
from thop import profile
from torch import nn

from prunekit.flops import count_modules, counters, total

SHAPE = (4, 8, 8)
PIXELS = 64


def of(*modules):
    return counters(nn.Sequential(*modules), SHAPE)


def macs(found):
    return {name: one["macs"] for name, one in found.items()}


@pytest.mark.parametrize(
    "module, params, multiply_adds",
    [
        (nn.Conv2d(4, 6, 3, padding=1, bias=False), 216, 6 * 4 * 9 * PIXELS),
        (nn.Conv2d(4, 6, 3, padding=1), 222, 6 * 4 * 9 * PIXELS),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), 108, 6 * 2 * 9 * PIXELS),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), 36, 4 * 9 * PIXELS),
        (nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=2), 222, 6 * 4 * 9 * PIXELS // 4),
        (nn.Linear(8, 5), 45, 5 * 8 * 4 * 8),
        (nn.BatchNorm2d(4), 8, 0),
        (nn.PReLU(4), 4, 0),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_all_four_counters_agree_on_single_layers(module, params, multiply_adds):
    """A bias adds parameters and no multiply-adds, for any of them."""
    found = of(module)
    assert set(macs(found).values()) == {multiply_adds}
    assert {one["params"] for name, one in found.items() if name != "torch"} == {params}


@pytest.mark.parametrize(
    "module",
    [
        nn.AdaptiveAvgPool2d(1),
        nn.AvgPool2d(2),
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
    ],
    ids=str,
)
def test_pooling_and_upsampling_have_no_macs_except_in_thop(module):
    found = macs(of(nn.Conv2d(4, 4, 1), module))
    thop = found.pop("thop")
    assert set(found.values()) == {16 * PIXELS}
    # Of these thop's figure leaves out only what it is told to leave out.
    extra = {nn.AdaptiveAvgPool2d: 0, nn.AvgPool2d: 4 * 16, nn.Upsample: 4 * 256}[type(module)]
    assert thop == 16 * PIXELS + extra * (11 if getattr(module, "mode", "") == "bilinear" else 1)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel, stride, output", [(2, 2, 256), (3, 1, 100)])
def test_thop_counts_transposed_convolution_by_output_size(groups, kernel, stride, output):
    found = macs(of(nn.ConvTranspose2d(4, 6, kernel, stride, groups=groups)))
    one_pixel = 6 * (4 // groups) * kernel**2
    assert found == {
        "prunekit": one_pixel * PIXELS,
        "fvcore": one_pixel * PIXELS,
        "torch": one_pixel * PIXELS,
        "thop": one_pixel * output,
    }


def test_thop_ignores_conv_subclasses_and_functional_convs():
    class Own(nn.Conv2d):
        pass

    class Function(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4, 1, 1))

        def forward(self, x):
            return nn.functional.conv2d(x, self.weight)

    found = of(Own(4, 6, 1))
    assert found["thop"]["params"] == found["thop"]["macs"] == 0
    assert found["prunekit"]["macs"] == found["fvcore"]["macs"] == found["torch"]["macs"] == 24 * PIXELS
    model = nn.Sequential(Function())
    found = counters(model, SHAPE)
    assert macs(found) == {"prunekit": 24 * PIXELS, "fvcore": 24 * PIXELS, "thop": 0, "torch": 24 * PIXELS}
    assert found["prunekit"]["modules"] == {"0": 24 * PIXELS} and count_modules(model, SHAPE)[1] == []


def test_thop_ignores_groupnorm_parameters():
    found = of(nn.GroupNorm(2, 4))
    assert [found[name]["params"] for name in ("prunekit", "fvcore", "thop")] == [8, 8, 0]
    assert set(macs(found).values()) == {0}


def alone(model, shape):
    """fvcore's and thop's own totals, and torch's, with nothing left out."""
    x = torch.zeros(1, *shape)
    model = copy.deepcopy(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(model, x)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        fvcore = int(analysis.total())
        kept = logging.root.manager.disable
        thop = int(profile(copy.deepcopy(model), inputs=(x,), verbose=False)[0])
        logging.disable(kept)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as mode, torch.no_grad():
        model(x)
    return {"fvcore": fvcore, "thop": thop, "torch": mode.get_total_flops()}


def test_unfiltered_totals_include_norms_activations_and_resizing():
    """What the README says that each counter adds for one element, of norms, activations, poolings, up-samplings."""
    elements = 4 * PIXELS
    for module, fvcore, thop in (
        (nn.BatchNorm2d(4), 2 * elements, 4 * elements),
        (nn.PReLU(4), 0, elements),
        (nn.AdaptiveAvgPool2d(1), elements, elements + 4),
        (nn.AvgPool2d(2), 0, elements // 4),
        (nn.MaxPool2d(2), 0, 0),
        (nn.Upsample(scale_factor=2), 4 * elements, 4 * elements),
        (nn.Upsample(scale_factor=2, mode="bilinear"), 4 * 4 * elements, 11 * 4 * elements),
    ):
        assert alone(nn.Sequential(module), SHAPE) == {"fvcore": fvcore, "thop": thop, "torch": 0}, module
    assert alone(nn.Sequential(nn.Conv2d(4, 6, 1)), SHAPE) == {
        "fvcore": 24 * PIXELS,
        "thop": 24 * PIXELS,
        "torch": 2 * 24 * PIXELS,
    }


def test_unfiltered_csnet_totals_equal_macs_plus_known_extras():
    model, shape = small_csnet(), (3, 32, 32)
    ours, _ = count_modules(model, shape)
    modules = dict(model.named_modules())
    convolutions = total(ours)["macs"]
    elements = {nn.BatchNorm2d: 0, nn.PReLU: 0, "up": 0}
    hooks = [
        module.register_forward_hook(lambda m, _, y: elements.update({type(m): elements[type(m)] + y.numel()}))
        for module in modules.values()
        if type(module) in elements
    ]
    plain = nn.functional.interpolate

    def watched(*arguments, **options):
        y = plain(*arguments, **options)
        elements["up"] += y.numel()
        return y

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "interpolate", watched)
        model.eval()(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    norms, activations, ups = elements.values()
    assert norms == activations > 0 and ups > 0
    assert alone(model, shape) == {
        "fvcore": convolutions + 2 * norms + 4 * ups,
        # Its up-sampling is a function, which thop does not see.
        "thop": convolutions + 4 * norms + activations,
        "torch": 2 * convolutions,
    }
