import io
from dataclasses import dataclass

import pytest
import torch
from helpers.deployed_models import pruned_model, relative_difference
from helpers.marks import seeds
from helpers.networks import init_norms
from torch import nn

from prunekit.deployment.deploy import CANDIDATES, deploy
from prunekit.deployment.deployed_model import DeployConfig
from prunekit.deployment.rewrite import rewrite
from prunekit.errors import ExportError

pytestmark = pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")
# Every option, with and without the others.
CONFIGS = [
    DeployConfig(),
    DeployConfig(8, merge_sums=True, prelu_to_relu=True, channels_last=True),
    DeployConfig(8, channels_last=True),
    DeployConfig(1, merge_sums=True, prelu_to_relu=True),
    DeployConfig(8, merge_sums=True, prelu_to_relu=True),
]


@pytest.mark.parametrize("seed", seeds(3))
def test_every_config_gives_equal_outputs_on_a_pruned_csnet(seed):
    model, example = pruned_model("csnet", seed, width=10)
    for config in CONFIGS:
        network = rewrite(model, example, config).recompile()
        for shape in ((2, 3, 32, 32), (1, 3, 48, 64), (1, 3, 37, 51)):
            assert relative_difference(model, network, *shape) < 1e-5, config


@pytest.mark.parametrize(("name", "options"), [("octresnet", {"depth": 8, "width": 8}), ("resnet", {"depth": 8})])
def test_configs_give_equal_outputs_on_resnets(name, options):
    model, example = pruned_model(name, 0, 0.3, **options)
    for config in (CONFIGS[0], CONFIGS[-1], *CANDIDATES["pt2"]):
        assert relative_difference(model, rewrite(model, example, config).recompile(), 2, 3, 32, 32) < 1e-5, config


def test_all_norms_are_folded_and_channels_padded_in_csnet():
    model, example = pruned_model("csnet", 0, width=10)
    deployed, record = deploy(model, example, measure=False)
    assert record.fallback_reason is None and record.kept_norms == [] and record.padded_channels > 0
    assert len(record.folded_norms) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules())
    assert record.max_abs_diff < 1e-4 and record.to_json()["config"]["pad_multiple"] == 8
    # Dilated branches are padded together; the output is not padded.
    convs = {name: m for name, m in deployed.named_modules() if isinstance(m, nn.Conv2d)}
    assert all(m.out_channels % 8 == 0 for name, m in convs.items() if "branches" not in name and "classif" not in name)


def test_fastest_config_is_chosen_and_all_are_recorded(monkeypatch):
    model, example = pruned_model("csnet", 0, width=10)
    monkeypatch.setattr("prunekit.deployment.deploy.time_interleaved", lambda calls, rounds: [5.0, 4.0, 1.0, 2.0])
    _, record = deploy(model, example, runtime="pt2")
    assert record.config == CANDIDATES["pt2"][2]
    assert [row["median_ms"] for row in record.candidates] == [5.0, 4.0, 1.0, 2.0]


def test_deployed_model_shares_no_memory_with_the_model():
    model, example = pruned_model("csnet", 0, width=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    deployed, _ = deploy(model, example, measure=False)
    with torch.no_grad():
        for parameter in deployed.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_deployed_model_can_be_pickled():
    model, example = pruned_model("octresnet", 0, 0.3, depth=8, width=8)
    deployed, _ = deploy(model, example, measure=False)
    file = io.BytesIO()
    torch.save(deployed, file)
    file.seek(0)
    assert relative_difference(deployed, torch.load(file, weights_only=False), 1, 3, 32, 32) == 0


class DataDependent(nn.Module):
    """Its control flow depends on values, so torch.fx cannot trace it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        return y if y.sum() > 0 else -y


def test_untraceable_model_is_returned_as_it_is_with_a_reason():
    model = DataDependent().eval()
    deployed, record = deploy(model, torch.randn(2, 3, 16, 16), measure=False)
    assert "torch.fx cannot trace the model" in record.fallback_reason
    assert relative_difference(model, deployed, 2, 3, 16, 16) == 0


class Stateful(nn.Module):
    """It returns other values at each call."""

    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 4, 1), 0

    def forward(self, x):
        self.calls += 1
        return {"out": [self.conv(x) * self.calls]}


def test_wrong_trace_is_rejected():
    _, record = deploy(Stateful().eval(), torch.randn(1, 3, 8, 8), measure=False)
    assert "gives other outputs than the model" in record.fallback_reason


class Shared(nn.Module):
    """One convolution and norm used twice, a term of a sum with a second user, and a norm after a ReLU."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.PReLU(3)
        self.late = nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.act(self.norm(self.conv(x)))
        z = self.conv(y)
        return self.late(torch.relu(self.norm(z + y))) + z


def test_shared_modules_and_norms_that_cannot_be_folded():
    torch.manual_seed(0)
    model = Shared()
    example = init_norms(model, 0, 16)
    model.eval()
    for config in CONFIGS:
        graph = rewrite(model, example, config)
        assert relative_difference(model, graph.recompile(), 2, 3, 16, 16) < 1e-5, config
    _, record = deploy(model, example, measure=False)
    assert len(record.folded_norms) == 1 and len(record.kept_norms) == 2


def test_pass_that_fails_is_left_out(monkeypatch):
    def fail(graph, multiple):
        raise KeyError("_5")

    model, example = pruned_model("octresnet", 0, 0.3, depth=8, width=8)
    monkeypatch.setattr("prunekit.deployment.rewrite.pad_channels", fail)
    deployed, record = deploy(model, example, runtime="onnxruntime", measure=False)
    assert record.fallback_reason is None and record.config == DeployConfig(merge_sums=True)
    monkeypatch.setattr("prunekit.deployment.rewrite.fold_norms", lambda graph: fail(graph, 8))
    deployed, record = deploy(model, example, measure=False)
    assert record.fallback_reason == "pad_multiple=8, channels_last: '_5'"
    assert relative_difference(model, deployed, 2, 3, 32, 32) == 0


def test_pass_that_changes_the_outputs_is_left_out(monkeypatch):
    def change(graph):
        for module in graph.module.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data *= 1.1
        return 0

    model, example = pruned_model("octresnet", 0, 0.3, depth=8, width=8)
    monkeypatch.setattr("prunekit.deployment.rewrite.merge_sums", change)
    monkeypatch.setattr("prunekit.deployment.deploy.time_interleaved", lambda calls, rounds: [*range(len(calls))])
    deployed, record = deploy(model, example, runtime="onnxruntime")
    assert len(record.rejected) == 4 and "merge_sums: the outputs differ by" in record.rejected[-1]
    assert relative_difference(model, deployed, 2, 3, 32, 32) < 1e-5
    monkeypatch.setattr("prunekit.deployment.rewrite.share_pooling", change)
    deployed, record = deploy(model, example, runtime="onnxruntime")
    assert "the outputs differ by" in record.fallback_reason
    assert relative_difference(model, deployed, 2, 3, 32, 32) == 0


@dataclass
class Result:
    out: torch.Tensor


class ReturnsResult(nn.Module):
    def forward(self, x):
        return Result(x)


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (nn.Conv2d(4, 1, 1), torch.zeros(2, 3, 8, 8), "the model fails on an input of 2×3×8×8: Given groups=1"),
        (nn.Conv2d(3, 1, 1, device="meta"), torch.zeros(2, 3, 8, 8), "on the meta device"),
        (ReturnsResult(), torch.zeros(2, 3), "returns Result; return a tensor"),
        (nn.Identity(), "image", "the example must be a tensor"),
    ],
)
def test_errors_are_one_line(model, example, message):
    with pytest.raises(ExportError, match=message) as error:
        deploy(model, example, measure=False)
    assert "\n" not in str(error.value)


def test_scripted_model_is_returned_as_it_is():
    model, example = pruned_model("resnet", 0, 0.3, depth=8)
    scripted = torch.jit.trace(model, example)
    deployed, record = deploy(scripted, example, measure=False)
    assert "torch.fx cannot trace the model" in record.fallback_reason
    assert relative_difference(model, deployed, 4, 3, 32, 32) < 1e-5


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrappers_for_training_are_removed(wrap):
    model, example = pruned_model("resnet", 0, 0.3, depth=8)
    deployed, record = deploy(wrap(model), example, measure=False)
    assert record.fallback_reason is None and record.folded_norms
    assert relative_difference(model, deployed, 2, 3, 32, 32) < 1e-5


def test_unknown_runtime_is_an_error():
    with pytest.raises(
        ExportError, match="unknown runtime 'tensorrt'; choose one of torch, pt2, onnxruntime, openvino"
    ):
        deploy(nn.Conv2d(3, 1, 1), torch.zeros(1, 3, 8, 8), runtime="tensorrt")
