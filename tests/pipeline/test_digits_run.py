"""A complete classification run with a tiny model, and the commands that read its folder."""

import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.fake_run import without_checksum, write_run
from helpers.small_run import BY_THRESHOLD, skip_export
from PIL import Image
from rich.console import Console

from prunekit.cli import main
from prunekit.commands.evaluate import evaluate
from prunekit.commands.predict import predict
from prunekit.config import registry
from prunekit.config.recipe import load
from prunekit.data.digits import digits
from prunekit.errors import CheckpointError, DataError, RecipeError
from prunekit.pipeline import stages
from prunekit.pipeline.runner import finetune_run, run_recipe, slim_run
from prunekit.reporting import load_run, report, summary_table

QUICK = [
    "backbone.options={depth: 8, width: 4}",
    *BY_THRESHOLD,
    "train.epochs=2",
    "train.batch_size=48",
    "train.gate_lr=0.1",
    "decay.weight=50",
    "slim.threshold=0.5",
    "finetune.epochs=1",
]


def quiet():
    return Console(quiet=True)


def recipe(*overrides):
    own = any(one.startswith("backbone=") for one in overrides)
    return load("digits_resnet", [*QUICK[own:], *overrides])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "toy"
    run_recipe(recipe(), out, quiet())
    return out


@pytest.fixture
def run(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "toy"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Skip export and figures, which take longest and are part of the complete run."""
    monkeypatch.setitem(report.__globals__, "report_figures", lambda *_: iter(()))
    skip_export(monkeypatch)


def read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Write validation images as files, in one folder per class: three of "3", two of "8"."""
    folder, val = tmp_path_factory.mktemp("photos"), digits("val")
    for digit, count in ((3, 3), (8, 2)):
        (folder / str(digit)).mkdir()
        for index in [i for i in range(len(val)) if val.label(i) == digit][:count]:
            Image.fromarray(val.image(index)[..., 0]).save(folder / str(digit) / f"{val.names[index]}.png")
    return folder


def test_classification_run_summary_and_curves(whole):
    summary = read(whole, "summary.json")
    assert summary["status"] == "complete" and summary["equivalence"]["passed"] and summary["kept"]["params_ratio"] < 1
    assert summary["export"]["max_abs_diff"] < 1e-3
    for part in ("dense", "slim", "finetuned"):
        assert set(summary[part]["metrics"]) == {"top1"}
    assert summary["reference"] == {"majority": {"top1": 36 / 355}}
    assert summary["finetuned"]["metrics"]["top1"] > summary["reference"]["majority"]["top1"]
    assert read(whole, "classes.json") == list("0123456789")
    curves = read(whole, "curves.json")
    for part, found in curves.items():
        confusion = np.array(found["confusion"])
        assert confusion.sum() == 355 and confusion.trace() / 355 == summary[part]["metrics"]["top1"]
    assert {line["metrics"]["top1"] for line in map(json.loads, (whole / "metrics.jsonl").open())} <= set(
        np.arange(356) / 355
    )


def test_gallery_of_classification(whole):
    entries, val = read(whole, "gallery/index.json"), digits("val")
    assert sum(entry["fixed"] for entry in entries) == 16
    assert [sum(entry["kind"] == kind for entry in entries) for kind in ("best", "worst")] == [4, 4]
    for entry in entries:
        picture = np.asarray(Image.open(whole / f"gallery/{entry['index']:04d}-image.png"))
        assert np.array_equal(picture, val.image(entry["index"]))
        assert entry["truth"] == str(val.label(entry["index"])) and entry["finetuned"]["class"] in "0123456789"
    assert len(list((whole / "gallery").iterdir())) == len(entries) + 1
    sure = {kind: [e["finetuned"] for e in entries if e["kind"] == kind] for kind in ("best", "worst")}
    assert min(one["probability"] for one in sure["best"]) > 1 / 10


def test_interrupted_run_resumes_to_same_result(tmp_path, whole, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    out = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setitem(stages.STAGE_FUNCTIONS, "finetune", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(), out, quiet())
    run_recipe(recipe(), out, quiet(), resume=True)
    for name in ("dense/model.safetensors", "finetuned/model.safetensors", "curves.json", "classes.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_predictions_table(whole, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "in")
    (tmp_path / "in" / "3" / "bad.png").write_bytes(b"no image")
    first = tmp_path / "in" / "8"
    # Two files may have one name in different folders.
    shutil.copy(sorted(first.iterdir())[0], tmp_path / "in" / "3" / sorted(first.iterdir())[1].name)
    with pytest.raises(DataError, match=r"bad\.png"):
        predict(whole, [tmp_path / "in" / "3", first], tmp_path / "out", console=quiet())
    (table,) = (tmp_path / "out").iterdir()
    rows = list(csv.DictReader(table.open()))
    assert table.name == "predictions.csv" and list(rows[0]) == ["file", "class", "probability"]
    good = sorted(p for p in (tmp_path / "in").rglob("*.png") if p.name != "bad.png")
    assert [row["file"] for row in rows] == [str(p) for p in good]
    assert all(row["class"] in "0123456789" and 0.1 <= float(row["probability"]) <= 1 for row in rows)


def test_predictions_agree_with_evaluation(run, photos, tmp_path):
    (table,) = predict(run, [photos / "3", photos / "8"], tmp_path / "out", console=quiet())
    rows = list(csv.DictReader(table.open()))
    right = [row["class"] == Path(row["file"]).parent.name for row in rows]
    (entry,) = evaluate(run, [f"mine={photos}"], quiet())
    assert (entry["images"], entry["metrics"]) == (5, {"top1": sum(right) / 5})
    shutil.copytree(photos, tmp_path / "more")
    shutil.copytree(photos / "3", tmp_path / "more" / "x")
    with pytest.raises(DataError, match=r"--data mine: .* has the class x, which the model does not know"):
        evaluate(run, [f"mine={tmp_path / 'more'}"], quiet())
    assert evaluate(run, [f"own={photos}"], quiet(), size=8)[0]["metrics"] == entry["metrics"]
    with pytest.raises(DataError, match="--size 7: must be at least 8"):
        evaluate(run, [f"own={photos}"], quiet(), size=7)
    (run / "classes.json").unlink()
    for call in (lambda: evaluate(run, [f"a={photos}"], quiet()), lambda: predict(run, [photos / "3"], tmp_path / "o")):
        with pytest.raises(CheckpointError, match=r"classes\.json is missing"):
            call()


def test_classes_are_copied_and_compared(run, tmp_path, photos):
    slim_run(run, recipe("slim.threshold=0.4"), tmp_path / "slim", quiet())
    assert read(tmp_path / "slim", "classes.json") == list("0123456789")
    found = read(tmp_path / "slim", "summary.json")
    assert set(found["slim"]["metrics"]) == set(found["dense"]["metrics"]) == {"top1"}
    (run / "classes.json").write_text(json.dumps(list("1023456789")))
    without_checksum(run, "classes.json")
    for call in (
        lambda: slim_run(run, recipe(), tmp_path / "new", quiet()),
        lambda: finetune_run(run, recipe(), tmp_path / "new", quiet()),
        lambda: run_recipe(recipe(f"init={run}"), tmp_path / "new", quiet()),
    ):
        with pytest.raises(RecipeError, match=r"its classes are 0, 1, 2.* were trained on 1, 0, 2.*name data"):
            call()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task=saliency"], "task saliency learns from masks, and the data set digits has class labels"),
        (["data.name=salient_shapes", "data.size=16"], "classification learns from class labels, .* has masks"),
        (["backbone.options.classes=7"], r"10 classes, and the model has 7 outputs; .*classes=10"),
        (["backbone={name: csnet}"], r"logits of shape \(1, 10\) for one image, not \(1, 1, 8, 8\)"),
        (
            ["task=saliency", "data.name=salient_shapes", "data.size=16"],
            r"task saliency with backbone resnet: the model must return a map .* not \(1, 10\)",
        ),
        (["train.augment={name: shift, options: {pixels: -1}}"], r"train\.augment: shift needs pixels >= 0"),
    ],
)
def test_invalid_combinations_are_refused_in_one_line(tmp_path, overrides, said):
    with pytest.raises(RecipeError, match=said) as caught:
        run_recipe(recipe(*overrides), tmp_path / "run", quiet())
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_backbone_that_fails_on_image_size_is_reported(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 900, 10))\n"
    )
    with pytest.raises(RecipeError, match=r"backbone net cannot take an image of 8×8 \(.*\); set data\.size=32$"):
        run_recipe(recipe(f"backbone={{name: net, file: {file}}}"), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_labels_out_of_range_are_reported(tmp_path, monkeypatch):
    def wrong(split):
        images = digits(split)
        monkeypatch.setattr(images, "label", lambda index: 10)
        return images

    entry = registry.Entry("wrong", wrong, "test")
    monkeypatch.setitem(registry.datasets._entries, "wrong", entry)
    with pytest.raises(DataError, match="has the label 10, and the data set has 10 classes"):
        run_recipe(recipe("data.name=wrong"), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_report_of_two_tasks(run, tmp_path):
    console = Console(width=80, file=io.StringIO(), color_system=None)
    report([run], None, console)
    text = console.file.getvalue()
    assert max(map(len, text.split("written to")[0].splitlines())) <= 80
    row = next(line for line in text.splitlines() if line.startswith("finetuned"))
    assert f"{read(run, 'summary.json')['finetuned']['metrics']['top1']:.3f}" in row
    assert "top1" in text and "max_f" not in text
    both = [run, write_run(tmp_path / "saliency", units=("block",))]
    console = Console(width=80, file=io.StringIO(), color_system=None)
    report(both, tmp_path / "out", console)
    text = console.file.getvalue()
    assert max(map(len, text.split("written to")[0].splitlines())) <= 80
    assert re.search(r"max_f +.*top1|top1 +.*max_f", text)
    table = summary_table([load_run(path) for path in both])
    assert table["top1"].isna().tolist() == [False] * 3 + [True] * 3
    assert table["max_f"].isna().tolist() == [True] * 3 + [False] * 3


def test_predict_command_writes_table(whole, photos, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(whole), str(photos / "3"), "--out", str(tmp_path / "out")])
    assert not stop.value.code and "finetuned model: predictions of 3 images saved to" in " ".join(
        capsys.readouterr().out.split()
    )
