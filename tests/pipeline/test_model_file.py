import functools
import json
import subprocess
import sys
import types

import pytest
import torch
from helpers.networks import Residual, Row
from helpers.small_run import small_run
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import prunekit
from prunekit.backbones.resnet import resnet
from prunekit.errors import CheckpointError, PluginError, PrunekitError
from prunekit.pipeline import model_file
from prunekit.pruning.provenance import get_provenance

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NET = """
import pathlib
from torch import nn

pathlib.Path({marker!r}).touch()


def build(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 1)
    )
"""


def prune(model, steps=1):
    pruner = prunekit.Pruner(model, IMAGES, importance="magnitude", pruning_ratio=0.5, steps=steps)
    for _ in range(steps):
        slim, _ = pruner.step()
    return slim.eval()


@functools.cache
def pruned_resnet():
    return prune(resnet(8))


@pytest.fixture
def user_file(tmp_path):
    """A module file with a ``build`` function, and the file that its import creates."""
    marker = tmp_path / "imported"
    (tmp_path / "my_net.py").write_text(NET.format(marker=str(marker)))
    return tmp_path / "my_net.py", marker


@pytest.mark.parametrize("steps", [1, 2])
def test_registered_builder_round_trip(tmp_path, steps):
    slim = prune(resnet(8), steps)
    prunekit.save(slim, tmp_path / "slim.prunekit", builder="resnet", options={"depth": 8})
    loaded = prunekit.load(tmp_path / "slim.prunekit")
    assert torch.equal(loaded(IMAGES), slim(IMAGES)) and not loaded.training
    assert len(get_provenance(loaded).plans) == steps


def test_loading_in_another_process_gives_the_same_outputs(tmp_path):
    slim = pruned_resnet()
    prunekit.save(slim, tmp_path / "slim.prunekit", builder="resnet", options={"depth": 8})
    save_file({"images": IMAGES}, tmp_path / "images.safetensors")
    code = (
        "import prunekit; from safetensors.torch import load_file, save_file\n"
        "slim = prunekit.load('slim.prunekit')\n"
        "save_file({'out': slim(load_file('images.safetensors')['images']).detach()}, 'out.safetensors')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert torch.allclose(file.get_tensor("out"), slim(IMAGES), rtol=0, atol=1e-6)


def test_loaded_model_can_be_pruned_and_saved_again(tmp_path):
    path = tmp_path / "slim.prunekit"
    prunekit.save(pruned_resnet(), path, builder="resnet", options={"depth": 8})
    slimmer = prune(prunekit.load(path))
    prunekit.save(slimmer, path)
    assert torch.equal(prunekit.load(path)(IMAGES), slimmer(IMAGES))


def test_dense_model_keeps_its_precision(tmp_path):
    model = Residual().to(torch.bfloat16)
    model.last_bn.double()
    prunekit.save(model, tmp_path / "dense", builder=Residual)
    loaded = prunekit.load(tmp_path / "dense", builder=Residual)
    assert loaded.head.weight.dtype == torch.bfloat16 and loaded.last_bn.bias.dtype == torch.float64
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_weights_shared_in_memory_are_saved(tmp_path):
    class Tied(Row):
        def __init__(self):
            super().__init__()
            self.alias = self.out

    model = Tied()
    prunekit.save(model, tmp_path / "tied", builder=importable(Tied))
    loaded = prunekit.load(tmp_path / "tied", builder=Tied)
    assert loaded.alias is loaded.out and torch.equal(loaded.out.weight, model.out.weight)


def importable(cls):
    """A class as if it were defined at the top of an importable module."""
    module = types.ModuleType("builder_of_tests")
    cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
    setattr(module, cls.__name__, cls)
    sys.modules[module.__name__] = module
    return cls


def test_newest_model_of_a_run_folder_is_loaded_and_saved(tmp_path):
    run = small_run(tmp_path / "run")
    slim = prunekit.load(run)
    assert slim.conv.out_channels < 4 and not slim.training
    prunekit.save(slim, tmp_path / "slim.prunekit")
    assert torch.equal(prunekit.load(tmp_path / "slim.prunekit")(IMAGES), slim(IMAGES))
    with pytest.raises(CheckpointError, match="is a run folder, whose recipe names the builder"):
        prunekit.load(run, builder=resnet)


def test_random_state_is_left_alone(tmp_path):
    slim = pruned_resnet()
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    prunekit.save(slim, tmp_path / "slim", builder="resnet", options={"depth": 8})
    prunekit.load(tmp_path / "slim")
    assert torch.equal(torch.randn(2), expected)


def test_unknown_builder_proposes_one(tmp_path):
    with pytest.raises(CheckpointError, match=r"save needs to know how .* pass builder='timm/resnet18', 'my_net.py:bu"):
        prunekit.save(pruned_resnet(), tmp_path / "slim")
    with pytest.raises(CheckpointError, match="options are given without a builder"):
        model = prunekit.load(saved(tmp_path))
        prunekit.save(model, tmp_path / "slim", options={"depth": 8})


def saved(folder):
    prunekit.save(pruned_resnet(), folder / "slim.prunekit", builder="resnet", options={"depth": 8})
    return folder / "slim.prunekit"


@pytest.mark.parametrize(
    ("builder", "options", "message"),
    [
        ("resnet", {"depth": 14}, "do not rebuild it: .*; pass the builder and options of the dense model"),
        ("resnet", {"dept": 8}, "unexpected keyword argument 'dept'"),
        ("resnt", {}, "unknown backbone 'resnt', did you mean 'resnet'"),
        ("resnet", {"depth": nn.Identity}, "options cannot be written as JSON"),
        ("no_such_package:build", {}, "the builder no_such_package:build cannot be imported .ModuleNotFoundError"),
        ("prunekit:__version__", {}, "is not a function"),
        ("no_such_file.py:build", {}, r"no_such_file.py does not exist; give the path of a Python file"),
    ],
)
def test_unusable_builders_are_refused_before_writing(tmp_path, builder, options, message):
    with pytest.raises(PrunekitError, match=message):
        prunekit.save(pruned_resnet(), tmp_path / "slim", builder=builder, options=options)
    assert not (tmp_path / "slim").exists()


def test_builders_that_cannot_be_imported_are_needed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(Row, "__module__", "__main__")
    for builder in (Row, lambda: Row(), functools.partial(Row, 0)):
        model = Row().eval()
        prunekit.save(model, tmp_path / "row", builder=builder)
        for trust in (False, True):
            with pytest.raises(
                PluginError, match=r"saved with a builder that cannot be imported .*; pass it as builder="
            ):
                prunekit.load(tmp_path / "row", trust=trust)
        loaded = prunekit.load(tmp_path / "row", builder=builder)
        assert torch.equal(loaded(IMAGES), model(IMAGES))
        with pytest.raises(CheckpointError, match="save needs to know how to build the dense model"):
            prunekit.save(loaded, tmp_path / "again")


def test_file_of_a_user_runs_only_with_trust(tmp_path, user_file):
    file, marker = user_file
    namespace = {}
    exec(file.read_text(), namespace)
    slim = prune(namespace["build"](6))
    prunekit.save(slim, tmp_path / "slim", builder=f"{file}:build", options={"width": 6})
    marker.unlink()
    _forget_imports()
    with pytest.raises(PluginError, match=r"builds its model with code: build in .*my_net.py; pass trust=True if"):
        prunekit.load(tmp_path / "slim")
    assert not marker.exists()
    assert torch.equal(prunekit.load(tmp_path / "slim", trust=True)(IMAGES), slim(IMAGES))
    assert marker.exists()
    loaded = prunekit.load(tmp_path / "slim", builder=namespace["build"])
    assert torch.equal(loaded(IMAGES), slim(IMAGES))


def test_changed_file_of_a_user_is_refused(tmp_path, user_file):
    file, marker = user_file
    namespace = {}
    exec(file.read_text(), namespace)
    prunekit.save(prune(namespace["build"]()), tmp_path / "slim", builder=f"{file}:build")
    file.write_text(file.read_text() + "\n# edited\n")
    marker.unlink()
    with pytest.raises(PluginError, match=r"my_net.py has changed .* put that version back, or pass a function"):
        prunekit.load(tmp_path / "slim", trust=True)
    assert not marker.exists()


def _forget_imports():
    from prunekit.config import user_module

    user_module._modules.clear()


def test_import_path_runs_only_with_trust(tmp_path, user_file, monkeypatch):
    file, marker = user_file
    monkeypatch.syspath_prepend(str(file.parent))
    import my_net

    slim = prune(my_net.build(6))
    prunekit.save(slim, tmp_path / "slim", builder=my_net.build, options={"width": 6})
    del sys.modules["my_net"]
    marker.unlink()
    with pytest.raises(PluginError, match="builds its model with code: my_net:build; pass trust=True"):
        prunekit.load(tmp_path / "slim")
    assert not marker.exists()
    assert torch.equal(prunekit.load(tmp_path / "slim", trust=True)(IMAGES), slim(IMAGES))
    del sys.modules["my_net"]


def rewrite(path, change):
    """Change the metadata of a saved file."""
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()[model_file.METADATA_KEY])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata)
    save_file(weights, path, {model_file.METADATA_KEY: json.dumps(metadata)})


@pytest.mark.parametrize(
    "builder",
    [
        {"name": "timm/hf-hub:someone/model"},
        {"name": "timm/resnet18", "options": {"pretrained": True}},
        {"name": "timm/resnet18", "options": {"checkpoint_path": "weights.pth"}},
        {"name": "torchvision/resnet18", "options": {"weights": "DEFAULT"}},
    ],
)
def test_no_weights_are_read_or_downloaded_without_trust(tmp_path, builder):
    path = saved(tmp_path)
    rewrite(path, lambda data: data.update(builder=builder))
    with pytest.raises(PluginError, match=r"asks its builder for other weights .*; pass trust=True if you trust"):
        prunekit.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format=2), "has format 2, this prunekit .* reads up to 1; install a newer prunekit"),
        (lambda data: data.pop("format"), "is damaged"),
        (lambda data: data.pop("builder"), r"its metadata is damaged \(builder: Field required\)"),
        (lambda data: data.update(input=None), r"its metadata is damaged \(input: None is not the shape of an input\)"),
        (lambda data: data.update(input=[3, 10**6, 10**6]), "is not the shape of an input"),
        (lambda data: data.update(input=[3, -1, 16]), "is not the shape of an input"),
        (lambda data: data["builder"]["options"].update(depth=14), "does not fit the model that its builder makes"),
        (lambda data: data["plans"][0]["groups"].update(conv=[0, 99]), "keeps channels of conv that it does not have"),
        (lambda data: data["plans"].clear(), "does not fit the model that its builder makes: .* was it changed"),
    ],
)
def test_damaged_metadata_is_reported(tmp_path, change, message):
    path = saved(tmp_path)
    rewrite(path, change)
    with pytest.raises(PrunekitError, match=message) as caught:
        prunekit.load(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_reported(tmp_path):
    with pytest.raises(
        CheckpointError,
        match=r"is not there; give a file that prunekit.save wrote, a run folder, or a model that prunekit list shows",
    ):
        prunekit.load(tmp_path / "missing")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights.pt is damaged or was not written by prunekit.save"):
        prunekit.load(tmp_path / "weights.pt")
    save_file({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"holds weights alone and was not written by prunekit.save"):
        prunekit.load(tmp_path / "weights.safetensors")
    data = saved(tmp_path).read_bytes()
    (tmp_path / "half").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="half is damaged"):
        prunekit.load(tmp_path / "half")


def test_metadata_is_plain_json_without_pickle(tmp_path):
    data = saved(tmp_path).read_bytes()
    assert b"pickle" not in data and data[:1] != b"\x80"
    with safe_open(tmp_path / "slim.prunekit", "pt") as file:
        metadata = json.loads(file.metadata()[model_file.METADATA_KEY])
    assert metadata["builder"] == {"name": "resnet", "options": {"depth": 8}}
    assert metadata["format"] == 1 and metadata["input"] == [3, 16, 16]
