"""A model handed to another process is the same model there, and its file is data."""

import pytest
import torch
from helpers.deployed_models import gap, learned
from safetensors.torch import load_file, save_file

from prunekit.deployment.bench.model_transfer import pack_model, unpack_model
from prunekit.deployment.form import Deployed, Form
from prunekit.errors import CheckpointError
from prunekit.pruning.plan import Builder

pytestmark = pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")
FORMS = [None, Form(8, sums=True, channels_last=True)]


@pytest.mark.parametrize("form", FORMS, ids=["eager", "deployed"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("csnet", {"width": 10}), ("octresnet", {"depth": 8, "width": 8}), ("resnet", {"depth": 8})],
)
def test_a_slim_model_is_the_same_there(tmp_path, name, options, form):
    model, _ = learned(name, 0, 0.5, **options)
    pack_model(tmp_path / "model", model, Builder(name=name, options=options), form, (3, 32, 32))
    there = unpack_model(tmp_path / "model")
    assert not there.training and not any(parameter.requires_grad for parameter in there.parameters())
    assert isinstance(there, Deployed) == (form is not None)
    if form is None:
        assert [n for n, _ in there.named_modules()] == [n for n, _ in model.named_modules()]
        assert repr(there) == repr(model)
    assert gap(model, there, 2, 3, 32, 32) <= (0 if form is None else 1e-5)


def test_a_user_file_builds_it(tmp_path):
    file = tmp_path / "net.py"
    file.write_text("from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4))\n")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.PReLU(2))
    pack_model(tmp_path / "model", model, Builder(name="build", file=str(file)), None, (3, 8, 8))
    assert gap(model, unpack_model(tmp_path / "model"), 1, 3, 8, 8) == 0


def test_subnormal_weights_arrive_as_zeros(tmp_path):
    model, _ = learned("resnet", 0, 0.0, depth=8)
    with torch.no_grad():
        model.conv.weight.view(-1)[:5] = 1e-40
    pack_model(tmp_path / "model", model, Builder(name="resnet", options={"depth": 8}), None, (3, 32, 32))
    assert not unpack_model(tmp_path / "model").conv.weight.view(-1)[:5].any()


def test_what_the_builder_does_not_make_is_refused(tmp_path):
    model, _ = learned("resnet", 0, 0.0, depth=14)
    pack_model(tmp_path / "model", model, Builder(name="resnet", options={"depth": 8}), None, (3, 32, 32))
    with pytest.raises(CheckpointError, match="builder makes no"):
        unpack_model(tmp_path / "model")
    save_file(load_file(tmp_path / "model"), tmp_path / "bare")
    with pytest.raises(CheckpointError, match="no model that was handed over"):
        unpack_model(tmp_path / "bare")
