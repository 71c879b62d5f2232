"""Networks that do something at some input sizes only, slimmed at one size and compared at many others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.marks import seeds
from helpers.networks import init_norms, zero_gates
from torch import nn

import prunekit
from prunekit.errors import PlanError
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.surgery.check_sizes import varied_sizes
from prunekit.pruning.surgery.slim import slim


def conv_bn(inp, out, kernel=1, **options):
    return nn.Sequential(nn.Conv2d(inp, out, kernel, bias=False, **options), nn.BatchNorm2d(out), nn.ReLU())


class Decoder(nn.Module):
    """Two floors of a U-Net; ``join`` brings the upper map, (N, C, h, w), to the size of the skip connection."""

    def __init__(self, join, down=F.max_pool2d, up=None):
        super().__init__()
        self.enter, self.low = conv_bn(3, 6, 3, padding=1), conv_bn(6, 8, 3, padding=1)
        self.lowest, self.middle, self.last = conv_bn(8, 8, 1), conv_bn(16, 6, 1), conv_bn(12, 6, 1)
        self.out = nn.Conv2d(6, 2, 1)
        self.join, self.down = join, down
        self.ups = nn.ModuleList([up(8), up(6)] if up else [])

    def forward(self, x):
        enter = self.enter(x)
        low = self.low(self.down(enter, 2))
        middle = self.middle(self.merge(self.lowest(self.down(low, 2)), low, 0))
        return self.out(self.last(self.merge(middle, enter, 1)))

    def merge(self, x, skip, floor):
        x = self.ups[floor](x, skip) if self.ups else F.interpolate(x, scale_factor=2)
        return torch.cat([skip, self.join(x, skip)], 1)


def missing(x, skip):
    return skip.shape[3] - x.shape[3], skip.shape[2] - x.shape[2]


def pad(x, skip, mode="constant"):
    width, height = missing(x, skip)
    return F.pad(x, [0, width, 0, height], mode=mode)


def pad_if_needed(x, skip):
    return pad(x, skip) if x.shape != skip.shape else x


def pad_both_sides(x, skip):
    width, height = missing(x, skip)
    return F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])


def fill(x, skip):
    full = x.new_zeros(*x.shape[:2], *skip.shape[2:])
    full[:, :, : x.shape[2], : x.shape[3]] = x
    return full


def append_zeros(x, skip):
    width, height = missing(x, skip)
    x = torch.cat([x, x.new_zeros(*x.shape[:3], width)], 3) if width else x
    return torch.cat([x, x.new_zeros(*x.shape[:2], height, x.shape[3])], 2) if height else x


def scale_if_odd(x, skip):
    x = F.interpolate(x, size=skip.shape[2:], mode="bilinear")
    return x * 0.5 if skip.shape[2] % 2 else x


def fade_border(x, skip):
    x = F.interpolate(x, size=skip.shape[2:])
    mask = torch.ones(skip.shape[2], 1).to(x)
    mask[-1 - skip.shape[2] % 2 :] = 0.5
    return x * mask if skip.shape[2] % 2 else x


class Up(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.ConvTranspose2d(width, width, 2, 2, bias=False), nn.BatchNorm2d(width)

    def forward(self, x, skip):
        return F.relu(self.norm(self.conv(x, output_size=skip.shape[2:])))


def ceil_pool(x, size):
    return F.max_pool2d(x, size, ceil_mode=True)


def padded_average(x, size):
    return F.avg_pool2d(x, 3, size, padding=1, ceil_mode=True)


def crop(x, skip):
    return x[:, :, : skip.shape[2], : skip.shape[3]]


def unshuffle(x, size):
    return x[:, :, ::size, ::size] if x.shape[2] % 2 else F.avg_pool2d(x, size)


NETWORKS = {
    "pad": lambda: Decoder(pad),
    "pad if needed": lambda: Decoder(pad_if_needed),
    "pad both sides": lambda: Decoder(pad_both_sides),
    "pad with another activation": lambda: Decoder(lambda x, skip: torch.sigmoid(pad(x, skip))),
    "reflect": lambda: Decoder(lambda x, skip: pad(x, skip, "reflect")),
    "replicate": lambda: Decoder(lambda x, skip: pad(x, skip, "replicate")),
    "circular": lambda: Decoder(lambda x, skip: pad(x, skip, "circular")),
    "fill": lambda: Decoder(fill),
    "append zeros": lambda: Decoder(append_zeros),
    "resize": lambda: Decoder(lambda x, skip: F.interpolate(x, size=skip.shape[2:], mode="bilinear")),
    "scale if odd": lambda: Decoder(scale_if_odd),
    "fade the border if odd": lambda: Decoder(fade_border),
    "adaptive pooling": lambda: Decoder(lambda x, skip: F.adaptive_avg_pool2d(x, skip.shape[2:])),
    "roll": lambda: Decoder(lambda x, skip: pad(x, skip).roll(skip.shape[2] % 2, 2)),
    "ceil and crop": lambda: Decoder(crop, ceil_pool),
    "padded average": lambda: Decoder(crop, padded_average),
    "another pooling if odd": lambda: Decoder(crop, lambda x, size: unshuffle(F.pad(x, [0, 1, 0, 1]), size)),
    "output_size": lambda: Decoder(lambda x, skip: x, up=Up),
    "sum": lambda: Decoder(lambda x, skip: pad(x, skip) / (skip.shape[2] % 4 + 1)),
}


@pytest.mark.parametrize("seed", seeds(2))
@pytest.mark.parametrize("name", NETWORKS)
def test_slim_model_holds_at_sizes_that_were_not_checked(name, seed):
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    example = init_norms(model, seed, 32, beta=0.7)
    groups = find_groups(model, example)
    zero_gates(model, groups, 0.4, seed)
    try:
        small, _ = slim(model.double(), extract(model, groups), example.double(), groups=groups, exact=True)
    except PlanError as error:
        assert "not equivalent" in str(error)
        return
    dense, small = copy.deepcopy(model).eval(), small.eval()
    for size in [(32, 32), *((side, side) for side in (33, 34, 35, 36, 42, 50, 98)), (34, 47), (45, 32)]:
        image = 3 * torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(small(image), dense(image), rtol=1e-9, atol=1e-9, msg=f"{name} at {size}")


def test_a_padding_is_exact_without_giving_channels_back():
    torch.manual_seed(0)
    model = Decoder(pad)
    example = init_norms(model, 0, 32, beta=0.7)
    groups = find_groups(model, example)
    zero_gates(model, groups, 0.4)
    _, equivalence = slim(model, extract(model, groups), example, groups=groups, exact=True)
    assert equivalence.given_back == 0 and equivalence.carriers > 0


def sizes_of(model, side):
    return varied_sizes(model, torch.zeros(2, 3, side, side))


@pytest.mark.parametrize("side", [32, 224])
def test_sizes_are_small_and_odd_at_every_scale(side):
    sides = [size[0] for size in sizes_of(nn.Sequential(*(nn.MaxPool2d(2) for _ in range(5))), side)]
    for scale in range(5):
        assert {side // 2**scale % 2 for side in sides} == {0, 1}
    assert max(sides) < 100


def test_the_size_of_the_example_is_chosen_only_where_it_is_needed():
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    assert sizes_of(fixed, 16) == [(16, 16)]
    assert (224, 224) not in sizes_of(nn.Conv2d(3, 4, 3), 224)
    # It is what the window is made for.
    assert (224, 224) in sizes_of(nn.Sequential(nn.MaxPool2d(16), nn.AdaptiveAvgPool2d(14)), 224)


class Branch(nn.Module):
    """Does something at one size alone, or at all others."""

    def __init__(self, at, there):
        super().__init__()
        self.at, self.there = at, there

    def forward(self, x):
        return x.flip(2) if (x.shape[2:] == self.at) == self.there else x


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("at", [(224, 224), (64, 64), (67, 67)])
def test_sizes_at_which_a_branch_is_taken_or_not_are_chosen(at, there):
    sizes = sizes_of(Branch(at, there), 224)
    assert at in sizes and len(sizes) > 1


def test_every_weight_of_a_kernel_meets_the_map():
    wide = nn.Sequential(nn.Conv2d(3, 4, 4, 32), nn.Conv2d(4, 4, 7, padding=3, groups=4))
    assert max(side for size in sizes_of(wide, 224) for side in size) >= 4 * 32


def test_two_sizes_are_enough_for_a_short_check():
    network = nn.Sequential(nn.Conv2d(3, 3, 4, 4), *(nn.Conv2d(3, 3, 2, 2) for _ in range(3)))
    example = torch.zeros(2, 3, 224, 224)
    assert len(varied_sizes(network, example, thorough=False)) == 2 < len(varied_sizes(network, example))
    wide = nn.Sequential(nn.Conv2d(3, 4, 4, 32), nn.Conv2d(4, 4, 7, padding=3, groups=4))
    assert max(side for size in varied_sizes(wide, example, thorough=False) for side in size) >= 4 * 32


@pytest.mark.parametrize("name", ["pad", "ceil and crop", "output_size"])
def test_a_short_check_of_the_pruner_passes(name):
    torch.manual_seed(0)
    model = NETWORKS[name]()
    example = init_norms(model, 0, 32, beta=0.7)
    options = {"importance": "magnitude", "pruning_ratio": 0.3}
    (_, short), (_, long) = (prunekit.Pruner(model, example, thorough=t, **options).step() for t in (False, True))
    assert len(short.equivalence.inputs) <= 2 <= len(long.equivalence.inputs)
