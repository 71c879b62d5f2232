import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console

from prunekit.cli import main
from prunekit.config.recipe import load
from prunekit.data.datasets import normalize
from prunekit.data.images import read_image, read_mask
from prunekit.pipeline.models import build_dense, load_model, save_model
from prunekit.runs.run_dir import RunDir
from prunekit.tasks.base import own_size
from prunekit.tasks.saliency_metrics import SaliencyMetrics
from prunekit.utils.progress import Reporter

SIZES = [(40, 56), (33, 47), (64, 20)]
METRICS = {"max_f", "mae", "s_measure", "max_e"}


def write_set(folder, sizes=SIZES, seed=0):
    """A red square on noise for each size (height, width), and its mask."""
    random = np.random.default_rng(seed)
    for name in ("images", "GT"):
        (folder / name).mkdir(parents=True)
    for number, (height, width) in enumerate(sizes):
        image = random.integers(0, 90, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), np.uint8)
        mask[5:15, 4:14] = 255
        image[mask > 0, 0] = 240
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "GT" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with a dense model without metrics, as after an import; and a data set."""
    here = tmp_path_factory.mktemp("evaluation")
    recipe = load("csnet", ["backbone.options.width=10", "data.size=32"])
    model = build_dense(recipe)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 32, 32))
    with RunDir.start(here / "run", recipe.dump(), {}) as run:
        save_model(run, "dense", model)
        run.update_summary("dense", {"params": 1, "macs": 2, "paper_flops": None})
    write_set(here / "photos")
    return here


@pytest.fixture
def call(made, tmp_path, monkeypatch, capsys):
    """Runs ``prunekit eval`` in a folder with copies of both; returns status, output and error."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["eval", *map(str, arguments)])
        out = capsys.readouterr()
        return stop.value.code, out.out, out.err

    return run


def sets():
    content = json.loads(Path("run/eval.json").read_text())
    assert content["format"] == 1
    return content["sets"]


def test_results_are_printed_and_saved(call):
    status, out, _ = call("run", "--data", "first=photos", "--data", "second=./photos")
    assert status == 0 and max(map(len, out.splitlines())) <= 80
    assert "dense model, size 32" in out and "first" in out and "second" in out
    first, second = sets()
    assert set(first) == {"name", "folder", "model", "mode", "images", "skipped", "metrics", "seconds"}
    assert set(first["metrics"]) == METRICS and first["seconds"] > 0
    given = {key: first[key] for key in ("name", "folder", "model", "mode", "images", "skipped")}
    assert given == {
        "name": "first",
        "folder": "photos",
        "model": "dense",
        "mode": "size 32",
        "images": 3,
        "skipped": 0,
    }
    assert second["folder"] == "./photos" and second["metrics"] == first["metrics"]
    for value in first["metrics"].values():
        assert f"{value:.4f}" in out


def test_a_set_replaces_itself_and_nothing_else(call):
    call("run", "--data", "a=photos", "--data", "b=photos")
    call("run", "--data", "a=photos", "--size", 48)
    write_set(Path("other"), SIZES[:2], seed=1)
    call("run", "--data", "a=other", "--data", "c=other")
    assert [(one["name"], one["mode"], one["folder"]) for one in sets()] == [
        ("a", "size 32", "other"),
        ("b", "size 32", "photos"),
        ("a", "size 48", "photos"),
        ("c", "size 32", "other"),
    ]
    assert sets()[0]["images"] == 2


def test_without_data_the_validation_set_of_the_run_is_used(call):
    data = {"name": "salient_shapes", "options": {"train": 4, "val": 6}}
    recipe = load("csnet", ["backbone.options.width=10", "data.size=32", f"data={json.dumps(data)}"])
    with RunDir.open("run", write=True) as run:
        run.write_bytes("recipe.yaml", recipe.dump().encode())
    status, out, _ = call("run")
    assert status == 0 and "validation" in out
    (own,) = sets()
    assert (own["name"], own["folder"], own["images"]) == ("validation", "salient_shapes", 6)
    assert json.loads(Path("run/summary.json").read_text())["dense"]["metrics"] == own["metrics"]


def test_missing_validation_set_is_named(call):
    recipe = load("csnet", ["backbone.options.width=10", "data.size=32", "data={name: folder, root: gone}"])
    with RunDir.open("run", write=True) as run:
        run.write_bytes("recipe.yaml", recipe.dump().encode())
    status, _, error = call("run")
    assert status == 2 and error.startswith("prunekit: the run's validation set: ") and "--data" not in error


def by_hand(model, size_of):
    """The protocol written out: one image at a time, float64 for what is not the network."""
    meter = SaliencyMetrics()
    for number in range(len(SIZES)):
        image, mask = (
            read_image(f"photos/images/{number}.png"),
            read_mask(f"photos/GT/{number}.png"),
        )
        planes = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
        planes = F.interpolate(planes, size_of(*mask.shape), mode="bilinear", align_corners=False)
        with torch.no_grad():
            scores = torch.sigmoid(model(normalize(planes)))
        levels = F.interpolate(scores, mask.shape, mode="bilinear", align_corners=False)[0, 0].numpy() * 255
        meter.update(levels.astype(np.uint8), mask)
    return meter.compute()


@pytest.mark.parametrize(
    "option, mode, size_of",
    [
        ([], "size 32", lambda height, width: (32, 32)),
        (["--size", 48], "size 48", lambda height, width: (48, 48)),
        (["--own-size"], "own size", lambda height, width: ((height + 15) // 16 * 16, (width + 15) // 16 * 16)),
    ],
)
def test_metrics_follow_the_published_protocol(call, option, mode, size_of):
    assert call("run", "--data", "a=photos", "--model", "dense", *option)[0] == 0
    assert sets()[0]["mode"] == mode
    expected = by_hand(load_model(RunDir.open("run"), "dense"), size_of)
    # Some gray levels are close to the next integer, where they are truncated.
    assert sets()[0]["metrics"] == pytest.approx(expected, abs=2e-4)


def test_own_size_is_rounded_up_to_a_multiple_of_16():
    assert own_size(33, 47) == (48, 48) and own_size(64, 20) == (64, 32) and own_size(1, 16) == (16, 16)


def test_metrics_do_not_depend_on_the_batch_size(call):
    for batch in (1, 2, 16):
        call("run", "--data", f"{batch}=photos", "--batch-size", batch)
    one, *others = (entry["metrics"] for entry in sets())
    for other in others:
        assert other == pytest.approx(one, abs=2e-4)


def test_metrics_are_added_to_a_summary_without_metrics(call):
    call("run", "--data", "own=photos", "--own-size", "--data", "b=photos")
    dense = json.loads(Path("run/summary.json").read_text())["dense"]
    assert dense == {"params": 1, "macs": 2, "paper_flops": None}, "another protocol than the run's"
    call("run", "--data", "a=photos")
    first = json.loads(Path("run/summary.json").read_text())["dense"]
    assert first == {"params": 1, "macs": 2, "paper_flops": None, "metrics": sets()[-1]["metrics"]}
    write_set(Path("other"), SIZES[:1], seed=3)
    call("run", "--data", "c=other")
    assert json.loads(Path("run/summary.json").read_text())["dense"] == first


def test_unreadable_images_can_be_skipped(call):
    Path("photos/images/1.png").write_bytes(b"no image")
    Image.new("RGB", (20, 20)).save("photos/images/lonely.png")
    status, _, error = call("run", "--data", "a=photos")
    assert status == 2 and "lonely.png" in error and "--on-error skip" in error and "data.on_error" not in error
    status, out, _ = call("run", "--data", "a=photos", "--on-error", "skip")
    assert status == 0 and "a: 2 images skipped" in out
    assert (sets()[0]["images"], sets()[0]["skipped"]) == (2, 2)


def test_brackets_in_a_name_are_not_markup(call):
    status, out, _ = call("run", "--data", "[red]{x}=photos")
    assert status == 0 and "[red]{x}" in out and sets()[0]["name"] == "[red]{x}"


def empty(folder):
    for name in ("images", "GT"):
        (Path(folder) / name).mkdir(parents=True)


def unpaired(folder):
    write_set(Path(folder), SIZES[:1])
    (Path(folder) / "GT" / "0.png").rename(Path(folder) / "GT" / "other.png")


def unreadable(folder):
    write_set(Path(folder), SIZES[:1])
    (Path(folder) / "images" / "0.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    "arguments, prepare, messages",
    [
        (["photos"], None, ["--data photos", "NAME=FOLDER"]),
        (["=photos"], None, ["NAME=FOLDER"]),
        (["a="], None, ["NAME=FOLDER"]),
        (["a=photos", "a=photos"], None, ["a is already used"]),
        (["a=photos", "b=gone"], None, ["--data b", "gone", "does not exist"]),
        (["a=photos", "b=run"], None, ["--data b", "images/"]),
        (["a=photos", "b=bad"], empty, ["--data b", "no pair", "0 images"]),
        (["a=photos", "b=bad"], unpaired, ["--data b", "no pair"]),
        (["b=bad"], unreadable, ["--data b", "0.png"]),
        (["b=bad", "--on-error", "skip"], unreadable, ["--data b", "none of the 1 pairs"]),
        (["a=photos", "--on-error", "stop"], None, ["--on-error stop"]),
        (["a=photos", "--model", "best"], None, ["--model best", "it has dense"]),
        (["a=photos", "--model", "slim"], None, ["--model slim", "it has dense"]),
        (["a=photos", "--size", "8"], None, ["--size 8", "at least 16"]),
        (["a=photos", "--size", "64", "--own-size"], None, ["exclude each other"]),
        (["a=photos", "--batch-size", "0"], None, ["--batch-size 0"]),
    ],
)
def test_errors_are_one_line_and_write_nothing(call, arguments, prepare, messages):
    if prepare:
        prepare("bad")
    before = Path("run/summary.json").read_bytes()
    options = [part for one in arguments for part in (["--data", one] if "=" in one or one == "photos" else [one])]
    status, _, error = call("run", *options)
    assert status == 2 and error.count("\n") == 1 and error.startswith("prunekit: ") and "Traceback" not in error
    for message in messages:
        assert message in error
    assert not Path("run/eval.json").exists() and Path("run/summary.json").read_bytes() == before


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2, "sets": []}', '{"format": 1, "sets": [3]}'])
def test_damaged_eval_json(call, content):
    Path("run/eval.json").write_text(content)
    status, _, error = call("run", "--data", "a=photos")
    assert status == 2 and error.count("\n") == 1 and "run/eval.json" in error and "remove it" in error
    Path("run/eval.json").unlink()
    assert call("run", "--data", "a=photos")[0] == 0


def test_folders_without_a_run(call):
    for folder in ("gone", "photos"):
        status, _, error = call(folder, "--data", "a=photos")
        assert status == 2 and error.count("\n") == 1 and "not a run folder" in error
    Path("run/dense/model.safetensors").unlink()
    status, _, error = call("run", "--data", "a=photos")
    assert status == 2 and error.count("\n") == 1 and "dense/model.safetensors is missing" in error


def test_progress_bar_with_brackets_in_its_name():
    console = Console(force_terminal=True, width=80, file=io.StringIO(), color_system=None)
    counter = Reporter(console).progress_bar("[/]{x}")
    counter(1, 2)
    counter.close()
    assert "[/]{x}" in console.file.getvalue()


def test_with_out_nothing_is_written_into_the_run_folder(call):
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    for number in (1, 2):
        status, out, _ = call("run", "--data", f"{number}=photos", "--out", "there")
        assert status == 0 and "saved to there/eval.json" in out
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    assert [one["name"] for one in json.loads(Path("there/eval.json").read_text())["sets"]] == ["1", "2"]


def test_a_read_only_run_folder_needs_out(call, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    status, _, error = call("run", "--data", "a=photos")
    assert status == 2 and "run cannot be written; give --out DIR" in error


def test_masks_that_are_all_empty_are_reported(call):
    for path in Path("photos/GT").iterdir():
        Image.new("L", Image.open(path).size).save(path)
    assert "a: all 3 masks are empty" in call("run", "--data", "a=photos")[1]
