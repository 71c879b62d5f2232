import io
import json

import pytest
from rich.console import Console

from prunekit.commands.profile import profile_recipe
from prunekit.errors import PlanError, RecipeError

SMALL = ["backbone.options={depth: 8, width: 4}", "latency.threads=1"]


def printed(*arguments, **options):
    text = io.StringIO()
    profile_recipe(*arguments, Console(file=text, width=100), **options)
    return text.getvalue()


def test_layers_are_listed_and_the_table_is_written(tmp_path):
    file = tmp_path / "table.json"
    text = printed("digits_resnet", [*SMALL, "latency.variants=12"], out=file)
    assert "ms at 100%" in text and "stage1.0.conv1" in text and "12 models in onnxruntime, 8×8, 1 thread" in text
    assert "saved to" in text and len(json.loads(file.read_text())["variants"]) == 12
    figure = tmp_path / "new" / "layers.svg"
    again = printed("digits_resnet", [*SMALL, f"latency.table={file}"], figure=figure)
    assert "onnxruntime, 8×8, 1 thread" in figure.read_text() and f"figure: {figure}" in again
    assert [line for line in again.splitlines() if line.startswith("stage1.0.conv1")] == [
        line for line in text.splitlines() if line.startswith("stage1.0.conv1")
    ]


def test_variants_are_written_to_be_timed_elsewhere(tmp_path):
    text = printed("digits_resnet", [*SMALL, "latency.variants=11"], write_variants=tmp_path / "files")
    names = {path.name for path in (tmp_path / "files").iterdir()}
    assert names == {"latencies.json", *(f"{number:03}.onnx" for number in range(11))} and "time each" in text
    table = tmp_path / "files" / "latencies.json"
    with pytest.raises(PlanError, match="0 measured variants"):
        printed("digits_resnet", [*SMALL, f"latency.table={table}"])
    content = json.loads(table.read_text())
    for number, variant in enumerate(content["variants"]):
        variant["ms"] = 3.0 - number / 10
    table.write_text(json.dumps(content))
    assert "11 models in onnxruntime" in printed("digits_resnet", [*SMALL, f"latency.table={table}"])
    with pytest.raises(RecipeError, match="is not empty"):
        printed("digits_resnet", SMALL, write_variants=tmp_path / "files")


def test_a_network_that_takes_one_size_only(tmp_path):
    options = {"depth": 1, "width": 8, "heads": 2, "patch": 4, "size": 16, "classes": 4}
    keys = [
        f"backbone.options={options}",
        "data.size=16",
        f"data.root={tmp_path}",
        "latency.runtime=torch",
        "latency.variants=11",
    ]
    assert "blocks.0.mlp" in printed("cifar_vit", keys)


def test_figure_of_an_unknown_kind_is_reported_before_anything_is_timed(tmp_path):
    with pytest.raises(RecipeError, match=r"must end in .png, .svg or .pdf"):
        printed("digits_resnet", SMALL, figure=tmp_path / "layers.jpeg")


def test_the_figure_has_the_name_that_was_asked_for(tmp_path):
    file = tmp_path / "table.json"
    printed("digits_resnet", [*SMALL, "latency.variants=12"], out=file)
    printed("digits_resnet", [*SMALL, f"latency.table={file}"], figure=tmp_path / "layers.v2.PNG")
    assert [path.name for path in tmp_path.iterdir() if path != file] == ["layers.v2.PNG"]


def test_mistyped_sources_are_reported(tmp_path):
    with pytest.raises(RecipeError, match="digits_resne"):
        printed("digits_resne", [])
