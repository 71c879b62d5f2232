import pytest
import torch
from helpers.deployed_models import pruned_model, relative_difference
from helpers.networks import BLOCKS
from safetensors.torch import load_file, save_file

from prunekit.deployment.bench.model_transfer import pack_model, unpack_model
from prunekit.deployment.deployed_model import DeployConfig, DeployedModel
from prunekit.errors import CheckpointError
from prunekit.pruning.plan import Builder

pytestmark = pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")
CONFIGS = [None, DeployConfig(8, merge_sums=True, channels_last=True)]


@pytest.mark.parametrize("config", CONFIGS, ids=["eager", "deployed"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("csnet", {"width": 10, "blocks": BLOCKS}), ("octresnet", {"depth": 8, "width": 8}), ("resnet", {"depth": 8})],
)
def test_slim_model_is_restored(tmp_path, name, options, config):
    model, _ = pruned_model(name, 0, 0.5, **options)
    pack_model(tmp_path / "model", model, Builder(name=name, options=options), config, (3, 32, 32))
    restored = unpack_model(tmp_path / "model")
    assert not restored.training and not any(parameter.requires_grad for parameter in restored.parameters())
    assert isinstance(restored, DeployedModel) == (config is not None)
    if config is None:
        assert [n for n, _ in restored.named_modules()] == [n for n, _ in model.named_modules()]
        assert repr(restored) == repr(model)
    assert relative_difference(model, restored, 2, 3, 32, 32) <= (0 if config is None else 1e-5)


def test_builder_from_a_user_file(tmp_path):
    file = tmp_path / "net.py"
    file.write_text("from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4))\n")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.PReLU(2))
    pack_model(tmp_path / "model", model, Builder(name="build", file=str(file)), None, (3, 8, 8))
    assert relative_difference(model, unpack_model(tmp_path / "model"), 1, 3, 8, 8) == 0


def test_subnormal_weights_become_zero(tmp_path):
    model, _ = pruned_model("resnet", 0, 0.0, depth=8)
    with torch.no_grad():
        model.conv.weight.view(-1)[:5] = 1e-40
    pack_model(tmp_path / "model", model, Builder(name="resnet", options={"depth": 8}), None, (3, 32, 32))
    assert not unpack_model(tmp_path / "model").conv.weight.view(-1)[:5].any()


def test_files_of_another_model_or_kind_are_rejected(tmp_path):
    model, _ = pruned_model("resnet", 0, 0.0, depth=14)
    pack_model(tmp_path / "model", model, Builder(name="resnet", options={"depth": 8}), None, (3, 32, 32))
    with pytest.raises(CheckpointError, match="builder makes no"):
        unpack_model(tmp_path / "model")
    save_file(load_file(tmp_path / "model"), tmp_path / "bare")
    with pytest.raises(CheckpointError, match="is not a packed model"):
        unpack_model(tmp_path / "bare")
