import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import params
from helpers.octave_networks import (
    EXAMPLE,
    LEAST,
    NETWORKS,
    Ends,
    Net,
    Plain,
    PreActivation,
    Residual,
    images,
    settled,
    unit,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunekit
from prunekit.errors import PlanError
from prunekit.layers.octave_ops import OctaveLayer
from prunekit.layers.octavize import octavize

SPLITS = ([0.5, 0.5], [0.25, 0.75], [0.0, 1.0], [0.5, 0.25, 0.25])


@pytest.mark.parametrize("split", [[1.0], [1, 0], [1, 0, 0]])
@pytest.mark.parametrize("name", NETWORKS)
def test_split_in_the_finest_branch_equals_the_original(name, split):
    model = settled(NETWORKS[name])
    made = octavize(model, EXAMPLE, split)
    # Only the biases of convolutions, which the norms behind them take, are added elsewhere.
    biased = name in ("Plain", "Mobile")
    assert params(model) - params(made) == (18 if name == "Plain" else 0)
    assert not any("to1" in key for key in made.state_dict())

    @settings(max_examples=8)
    @given(size=st.tuples(*[st.integers(LEAST.get(name, 1), 25)] * 2), seed=st.integers(0, 99))
    def holds(size, seed):
        x = images(size, seed)
        with torch.no_grad():
            torch.testing.assert_close(made(x), model(x), rtol=1e-6 * biased, atol=1e-6 * biased)

    holds()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NETWORKS)
def test_any_split_accepts_the_sizes_of_the_original(name, split):
    model = settled(NETWORKS[name])
    made = octavize(model, EXAMPLE, split)

    @settings(max_examples=6)
    @given(size=st.tuples(*[st.integers(LEAST.get(name, 1), 25)] * 2))
    def holds(size):
        with torch.no_grad():
            wanted, found = model(images(size)), made(images(size))
        assert found.shape == wanted.shape and found.isfinite().all()

    holds()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_is_rewritten_or_listed(name):
    model = NETWORKS[name]()
    made = octavize(model, EXAMPLE)
    convs = {key for key, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert convs <= set(made.octave_layers) | set(made.octave_left)
    assert not convs & set(made.octave_layers) & set(made.octave_left)
    for key in made.octave_layers:
        assert isinstance(made.get_submodule(key), OctaveLayer)
    for key in convs - set(made.octave_layers):
        assert type(made.get_submodule(key)) is nn.Conv2d and made.octave_left[key]


def test_weights_are_slices_of_the_original():
    model = settled(Residual)
    made = octavize(model, EXAMPLE, [0.25, 0.75])
    channels = {3: [3], 8: [2, 6], 6: [1, 5], 12: [3, 9]}

    def part(tensor, axis, of, branch):
        return tensor.split(channels[of], axis)[branch]

    seen = 0
    for name in made.octave_layers:
        conv, layer = model.get_submodule(name), made.get_submodule(name)
        norm = model.bn if name == "stem" else model.get_submodule(name[:-1] + "1")
        assert set(layer.mix.paths) == {f"{i}to{j}" for i in range(len(channels[conv.in_channels])) for j in range(2)}
        for key, path in layer.mix.paths.items():
            i, j = map(int, key.split("to"))
            wanted = part(part(conv.weight, 0, conv.out_channels, j), 1, conv.in_channels, i)
            assert torch.equal(path.weight, wanted) and path.in_channels == wanted.shape[1]
            assert path.stride == conv.stride
        for b, branch in layer.norms.items():
            assert branch.num_features == channels[conv.out_channels][int(b)]
            for key in ("weight", "bias", "running_mean", "running_var"):
                assert torch.equal(getattr(branch, key), part(getattr(norm, key), 0, conv.out_channels, int(b)))
            assert branch.num_batches_tracked == norm.num_batches_tracked == 4
            seen += 1
    assert seen == 2 * 7
    assert [act.num_parameters for act in made.get_submodule("b1.0").acts.values()] == [1, 1]
    assert [act.num_parameters for act in made.get_submodule("b2.0").acts.values()] == [1, 5]


def test_two_branches_equal_the_papers_formula():
    model = settled(lambda: Net(lambda net, x: F.elu(x)))
    made = octavize(model, EXAMPLE)
    x = images((8, 12))
    (conv, norm, _), split = model.one, lambda t: t.split(3)

    def bn(y, norm, b):
        parts = [split(t)[b] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
        return F.batch_norm(y, *parts, eps=norm.eps)

    def up(y):
        return F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)

    with torch.no_grad():
        x = model.stem(x)
        fine, coarse = (F.conv2d(F.max_pool2d(x, 2**b), split(conv.weight)[b], padding=1) for b in (0, 1))
        fine, coarse = (F.elu(F.relu(bn(y, norm, b))) for b, y in enumerate((fine, coarse)))
        conv, norm, _ = model.two
        w = [[p.split(3, 1)[i] for i in (0, 1)] for p in split(conv.weight)]
        y0 = F.conv2d(fine, w[0][0], padding=1) + up(F.conv2d(coarse, w[0][1], padding=1))
        y1 = F.conv2d(F.max_pool2d(fine, 2), w[1][0], padding=1) + F.conv2d(coarse, w[1][1], padding=1)
        y0, y1 = (F.relu(bn(y, norm, b)).mean((2, 3)) for b, y in enumerate((y0, y1)))
        torch.testing.assert_close(made(images((8, 12))), model.head(torch.cat([y0, y1], 1)))


def test_reasons_for_layers_that_stay_plain():
    left = octavize(Ends(), EXAMPLE).octave_left
    assert left.pop("stem.0") == "the stem: it reads the model's input"
    assert left.pop("out") == "the head: it computes the model's output"
    assert set(left) == {"cat", "grouped.0", "dilated", "valid", "biased", "mean", "mul"}


def test_stem_produces_branches_for_a_shortcut():
    assert octavize(Residual(), EXAMPLE).octave_layers[0] == "stem"
    assert "features.0.0" in octavize(Plain(), EXAMPLE).octave_left
    # A sum with what never had branches is a plain one.
    model = settled(lambda: Net(lambda net, x: x + net.module(x), module=nn.Conv2d(6, 6, 3, padding=1, groups=2)))
    made = octavize(model, EXAMPLE)
    assert made.octave_left["add"] == "a sum with a plain tensor"


def test_long_chain_of_sums():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.head = unit(3, 4), conv4(), nn.Linear(4, 2)

        def forward(self, x):
            x = self.stem(x)
            for _ in range(300):
                x = F.relu(x) + 0.5 * x
            return self.head((x + self.conv(x)).mean((2, 3)))

    def conv4():
        return nn.Conv2d(4, 4, 3, padding=1, bias=False)

    assert octavize(Deep(), EXAMPLE).octave_layers == ["stem.0", "conv"]


def test_inplace_functions_do_not_change_shared_tensors():
    """The sum of a branch and nothing is that branch itself, and the shortcut reads it again."""
    module, relu = nn.Conv2d(6, 6, 1, bias=False), nn.ReLU(inplace=True)

    def middle(net, x):
        x = x - 0.5
        return net.relu(net.module(x) + x) + x

    model = settled(lambda: Net(middle, module=module, relu=relu))
    made = octavize(model, EXAMPLE)
    paths = made.module.mix.paths
    zero = copy.deepcopy(made)
    with torch.no_grad():
        for key in ("0to1", "1to1"):
            zero.module.mix.paths[key].weight.zero_()
            del paths[key]
        assert torch.equal(made(images((9, 9))), zero(images((9, 9))))


def test_keep_leaves_matching_modules_unchanged():
    model = settled(Residual)
    made = octavize(model, EXAMPLE, keep=["b2.0", "a*"])
    assert made.octave_left["b2.0"] == made.octave_left["a1"] == "named in keep"
    assert torch.equal(made.a1[0].weight, model.a1[0].weight) and "b1.0" in made.octave_layers


def test_modes_and_frozen_parameters_are_preserved():
    model = settled(Residual).train()
    model.a1.eval()
    model.b2[0].weight.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    made = octavize(model, EXAMPLE)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    layer = made.get_submodule("a1.0")
    assert made.training and not any(m.training for m in layer.modules()) and made.b1.training
    frozen = {key for key, p in made.named_parameters() if not p.requires_grad}
    assert frozen == {f"b2.0.mix.paths.{key}.weight" for key in ("0to0", "0to1", "1to0", "1to1")}
    with torch.no_grad():
        layer.mix.paths["0to0"].weight.zero_()
    assert torch.equal(model.a1[0].weight, before["a1.0.weight"])


def test_functional_dropout_follows_train_mode():
    model = Net(lambda net, x: F.dropout(x, 0.5, net.training))
    made = octavize(model, EXAMPLE)
    x = images((8, 8))
    made.eval()
    assert torch.equal(made(x), made(x))
    made.two.eval(), made.one.eval()
    made.train(True)
    assert not torch.equal(made(x), made(x))


def test_deepcopy_and_state_dict():
    model = settled(PreActivation)
    made = octavize(model, EXAMPLE, [0.5, 0.25, 0.25]).eval()
    twin = copy.deepcopy(made)
    other = octavize(PreActivation(), EXAMPLE, [0.5, 0.25, 0.25]).eval()
    other.load_state_dict(made.state_dict())
    x = images((9, 14))
    with torch.no_grad():
        assert torch.equal(twin(x), made(x)) and torch.equal(other(x), made(x))
        twin.stem.mix.paths["0to0"].weight.zero_()
        assert not torch.equal(twin(x), made(x))
    assert list(other.state_dict()) == list(made.state_dict())


def test_step_scales_and_constants_are_preserved():
    model = Net(lambda net, x: x + torch.ones(6, 1, 1))
    model.step_scales = lambda: {"one.0.weight": 100.0, "head.weight": 3.0}
    made = octavize(model, EXAMPLE)
    scales = made.step_scales()
    assert scales.pop("head.weight") == 3.0
    assert scales == {f"one.0.mix.paths.{key}.weight": 100.0 for key in ("0to0", "0to1")}
    assert not any("constant" in key for key in made.state_dict())


def changes(net, x):
    return F.relu(x) if net.training else x


@pytest.mark.parametrize(
    "model, why",
    [
        (lambda: Net(lambda net, x: x if x.sum() > 0 else -x), "cannot trace the model: symbolically traced"),
        (lambda: Net(changes), "train and eval mode call different operations"),
        (
            lambda: Net(lambda net, x: F.dropout(x, 0.5 + net.training / 4, net.training)),
            "gets 0.75 in train mode and 0.5",
        ),
        (
            lambda: Net(lambda net, x: x if isinstance(x, torch.Tensor) else F.relu(-1 * x)),
            "a different output",
        ),
        (lambda: nn.Bilinear(3, 3, 2), "fails on an input|cannot trace"),
        (lambda: Net(lambda net, x: x[:, :2]), "the model fails on an input of shape"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False)),
            "can become multi-scale",
        ),
        (lambda: nn.Sequential(nn.ReLU()), "the model has none"),
        (lambda: octavize(Plain(), EXAMPLE), "already has multi-scale layers"),
    ],
)
def test_errors_are_one_line(model, why):
    model = model()
    with pytest.raises(PlanError, match=why) as caught:
        octavize(model, EXAMPLE)
    assert "\n" not in str(caught.value)


def test_keep_pattern_without_match_raises():
    with pytest.raises(PlanError, match=r"no module matches 'b2\.x'; did you mean 'b2"):
        octavize(Residual(), EXAMPLE, keep=["b2.x"])


def test_untraceable_module_can_be_kept():
    class Odd(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    made = octavize(Net(lambda net, x: net.module(x), module=Odd()), EXAMPLE, keep=["module"])
    assert made.octave_left["module"] == "named in keep" and made(images((9, 9))).shape == (2, 3)


def test_invalid_split_raises():
    with pytest.raises(ValueError, match="add up to 1"):
        octavize(Plain(), EXAMPLE, [0.5, 0.6])


def test_lost_hooks_and_unused_parameters_are_listed():
    model = Net(lambda net, x: x, spare=nn.Conv2d(3, 3, 1))
    model.one.register_forward_hook(lambda *_: None)
    model.two[0].register_forward_hook(lambda *_: None)
    left = octavize(model, EXAMPLE).octave_left
    assert "hooks were dropped" in left["one"] and left["two.0"] == "it has hooks" and "never called" in left["spare"]


def test_public_api():
    assert prunekit.octavize is octavize


class Centred(nn.Module):
    """Changes its input in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2, self.out = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x -= 0.5
        x = self.norm(self.conv(x)).relu()
        return self.out(self.norm2(self.conv2(x)).relu())


def test_example_is_not_changed_by_a_model_that_changes_its_input():
    torch.manual_seed(0)
    example = torch.randn(2, 3, 32, 32)
    before = example.clone()
    octavize(Centred().eval(), example)
    assert torch.equal(example, before)
