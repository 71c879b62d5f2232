import shutil

import pytest
import torch
from rich.console import Console

import prunekit
from prunekit import weights
from prunekit.commands.list import table
from prunekit.commands.predict import predict
from prunekit.commands.watch import read_snapshot
from prunekit.config.recipe import load
from prunekit.errors import CheckpointError, RunFolderError
from prunekit.pipeline.export import export_run
from prunekit.pipeline.models import build_dense, open_initial_run, save_model
from prunekit.runs.run_dir import RunDir

CARD = "# csnet-tiny\n\nA small model for tests.\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of shipped models, with one untrained model."""
    folder = tmp_path_factory.mktemp("weights")
    recipe = load("csnet", ["backbone.options.width=10", "data.size=32", "name=tiny"])
    with RunDir.start(folder / "csnet-tiny", recipe.dump(), {}) as run:
        model = build_dense(recipe)
        with torch.no_grad():
            model(torch.randn(2, 3, 32, 32))  # statistics for the norms
        save_model(run, "dense", model)
        run.end("train")
        run.finish()
    (folder / "csnet-tiny" / weights.CARD).write_text(CARD)
    return folder


@pytest.fixture
def shipped(made, tmp_path, monkeypatch):
    """A copy of that folder in place of the package's; the working folder is empty."""
    shutil.copytree(made, tmp_path / "weights")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(weights, "_FOLDER", tmp_path / "weights")
    return tmp_path / "weights"


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_shipped_model_is_found_by_its_name(shipped, sample):
    before = contents(shipped)
    (written,) = predict("csnet-tiny", [sample], shipped.parent / "maps")
    assert written.is_file() and contents(shipped) == before
    model = prunekit.load("csnet-tiny")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1, 32, 32) and not model.training


@pytest.fixture
def sample(tmp_path):
    from prunekit.data.images import write_image

    path = tmp_path / "photo.png"
    write_image(path, torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8).numpy())
    return path


def test_a_path_of_that_name_comes_first(shipped, tmp_path):
    shutil.copytree(shipped / "csnet-tiny", tmp_path / "here" / "csnet-tiny")
    assert RunDir.open("csnet-tiny").path.resolve() == tmp_path / "here" / "csnet-tiny"


def test_results_go_to_a_copy(shipped, tmp_path):
    before = contents(shipped)
    (file,) = export_run("csnet-tiny", "onnx", Console(quiet=True))
    assert file.resolve() == tmp_path / "here" / "runs" / "csnet-tiny" / "model.onnx" and contents(shipped) == before
    changed = contents(tmp_path / "here" / "runs")
    with RunDir.open("csnet-tiny", write=True):
        pass
    assert {path: data for path, data in contents(tmp_path / "here" / "runs").items() if path in changed} == changed


def test_a_mistyped_name_gets_a_suggestion(shipped):
    for function, error in ((RunDir.open, RunFolderError), (prunekit.load, CheckpointError)):
        with pytest.raises(error, match="did you mean csnet-tiny"):
            function("csnet-tny")


def test_training_can_start_from_a_shipped_model(shipped):
    recipe = load("csnet", ["backbone.options.width=10", "init=csnet-tiny"])
    assert open_initial_run(recipe).path == shipped / "csnet-tiny"


def test_the_list_has_the_first_line_of_each_card(shipped):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table())
    assert "csnet-tiny" in capture.get() and "A small model for tests." in capture.get()


def test_a_shipped_model_cannot_be_watched(shipped):
    with pytest.raises(RunFolderError, match="show it with: prunekit report csnet-tiny"):
        read_snapshot("csnet-tiny")


@pytest.mark.parametrize("name", weights.shipped_models())
def test_each_model_of_the_package(name):
    folder = weights.shipped_models()[name]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    # Nothing of the machine that trained it.
    text = "".join(path.read_text() for path in files if path.suffix != ".safetensors")
    assert not any(part in text for part in ("/tmp", "/home", "/root", "/work"))
    run = RunDir.open(name)
    for file in run.recorded_files():
        run.read_bytes(file)  # verifies its checksum
    model = prunekit.load(name)
    params = sum(parameter.numel() for parameter in model.parameters())
    assert params == run.read_json("summary.json")["slim"]["params"]
    assert f"{params:,} parameters" in (folder / weights.CARD).read_text()
