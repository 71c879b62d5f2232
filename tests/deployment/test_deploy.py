"""The deployed form computes what the model does, on learned odd splits and on other networks."""

import io

import pytest
import torch
from helpers.deployed_models import gap, learned
from helpers.networks import init_norms
from torch import nn

from prunekit.deployment.deploy import FORMS, deploy
from prunekit.deployment.form import Form
from prunekit.deployment.rewrite import rewrite
from prunekit.errors import ExportError

pytestmark = pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")
# Every part of a form, with and without each other.
EVERY = [
    Form(),
    Form(8, sums=True, relus=True, channels_last=True),
    Form(8, inputs=True, channels_last=True),
    Form(1, sums=True, inputs=True, relus=True),
    Form(8, sums=True, inputs=True, relus=True),
]


@pytest.mark.parametrize("seed", range(3))
def test_every_form_of_a_learned_csnet_computes_the_same(seed):
    model, example = learned("csnet", seed, width=10)
    for form in EVERY:
        network = rewrite(model, example, form).finish()
        for shape in ((2, 3, 32, 32), (1, 3, 48, 64), (1, 3, 37, 51)):
            assert gap(model, network, *shape) < 1e-5, form


@pytest.mark.parametrize(("name", "options"), [("octresnet", {"depth": 8, "width": 8}), ("resnet", {"depth": 8})])
def test_other_backbones(name, options):
    model, example = learned(name, 0, 0.3, **options)
    for form in (EVERY[0], EVERY[-1], *FORMS["pt2"]):
        assert gap(model, rewrite(model, example, form).finish(), 2, 3, 32, 32) < 1e-5, form


def test_nothing_of_a_csnet_is_left_undone():
    model, example = learned("csnet", 0, width=10)
    deployed, record = deploy(model, example, measure=False)
    assert record.reason is None and record.left == [] and record.padded > 0
    assert len(record.folded) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules())
    assert record.max_abs_diff < 1e-4 and record.to_json()["form"]["multiple"] == 8
    # The dilations are padded together, and the logits are not.
    convs = {name: m for name, m in deployed.named_modules() if isinstance(m, nn.Conv2d)}
    assert all(m.out_channels % 8 == 0 for name, m in convs.items() if "branches" not in name and "classif" not in name)


def test_the_quickest_form_is_taken_and_all_are_recorded(monkeypatch):
    model, example = learned("csnet", 0, width=10)
    monkeypatch.setattr("prunekit.deployment.deploy.by_turns", lambda calls: [5.0, 4.0, 3.0, 1.0, 2.0])
    _, record = deploy(model, example, runtime="pt2")
    assert record.form == FORMS["pt2"][3]
    assert [row["median_ms"] for row in record.measured] == [5.0, 4.0, 3.0, 1.0, 2.0]


def test_the_model_is_left_alone_and_shares_nothing():
    model, example = learned("csnet", 0, width=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    deployed, _ = deploy(model, example, measure=False)
    with torch.no_grad():
        for parameter in deployed.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_can_be_pickled():
    model, example = learned("octresnet", 0, 0.3, depth=8, width=8)
    deployed, _ = deploy(model, example, measure=False)
    file = io.BytesIO()
    torch.save(deployed, file)
    file.seek(0)
    assert gap(deployed, torch.load(file, weights_only=False), 1, 3, 32, 32) == 0


class Looks(nn.Module):
    """A network whose forward looks at numbers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        return y if y.sum() > 0 else -y


def test_what_cannot_be_followed_stays_as_it_is_and_says_so():
    model = Looks().eval()
    deployed, record = deploy(model, torch.randn(2, 3, 16, 16), measure=False)
    assert "torch.fx cannot follow the model" in record.reason
    assert gap(model, deployed, 2, 3, 16, 16) == 0


class Counts(nn.Module):
    """A network that gives something else at every call."""

    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 4, 1), 0

    def forward(self, x):
        self.calls += 1
        return {"out": [self.conv(x) * self.calls]}


def test_a_trace_that_computes_something_else_is_not_taken():
    _, record = deploy(Counts().eval(), torch.randn(1, 3, 8, 8), measure=False)
    assert "not what the model computes: its outputs differ" in record.reason


class Shared(nn.Module):
    """One convolution and norm, used twice; a sum whose side something else reads; a norm behind a ReLU."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.PReLU(3)
        self.late = nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.act(self.norm(self.conv(x)))
        z = self.conv(y)
        return self.late(torch.relu(self.norm(z + y))) + z


def test_a_module_used_twice_and_norms_that_must_stay():
    torch.manual_seed(0)
    model = Shared()
    example = init_norms(model, 0, 16)
    model.eval()
    for form in EVERY:
        graph = rewrite(model, example, form)
        assert gap(model, graph.finish(), 2, 3, 16, 16) < 1e-5, form
    _, record = deploy(model, example, measure=False)
    assert len(record.folded) == 1 and len(record.left) == 2


def test_an_unknown_runtime_is_refused():
    with pytest.raises(ExportError, match="'tensorrt'; there are torch, pt2, onnxruntime, openvino"):
        deploy(nn.Conv2d(3, 1, 1), torch.zeros(1, 3, 8, 8), runtime="tensorrt")
