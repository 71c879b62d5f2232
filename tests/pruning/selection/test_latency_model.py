import json

import numpy as np
import pytest
import torch
from helpers.latencies import cut, synthetic_ms, synthetic_table

from prunekit.backbones.resnet import resnet
from prunekit.deployment.bench.variants import random_variants
from prunekit.errors import PlanError
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.cost_model import SizeModel
from prunekit.pruning.selection.latency_model import LatencyTable, Variant

SHAPE = (3, 32, 32)


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    model = resnet(depth=14, width=8).eval()
    groups = find_groups(model, torch.randn(2, *SHAPE))
    return model, groups, synthetic_table(model, groups, SHAPE)


def test_latencies_of_other_models_are_predicted(measured):
    model, groups, table = measured
    sizes = SizeModel(model, groups, SHAPE, table)
    assert sizes.latency.error < 0.03 and sizes.latency.rank > 0.98
    assert sizes.dense.latency_ms == pytest.approx(synthetic_ms(model, SHAPE), rel=0.02)
    errors = []
    for kept in random_variants(model, groups, 12, seed=1)[1:]:
        dead = {g.id: g.channels - kept[g.id] for g in groups if g.reason is None}
        errors.append(sizes.size_without(dead).latency_ms / synthetic_ms(cut(model, groups, kept), SHAPE) - 1)
    assert np.median(np.abs(errors)) < 0.03
    assert SizeModel(model, groups, SHAPE).dense.to_json().keys() == {"params", "macs"}


@pytest.mark.parametrize("vector", [1, 4, 8])
def test_length_of_vectors_is_found(measured, vector):
    model, groups, _ = measured
    sizes = SizeModel(model, groups, SHAPE, synthetic_table(model, groups, SHAPE, vector=vector))
    assert sizes.latency.terms.vector == vector and sizes.latency.error < 0.03


def test_table_is_the_same_after_a_file(measured, tmp_path):
    file = tmp_path / "table.json"
    file.write_text(json.dumps(measured[2].to_json()))
    assert LatencyTable.read(file) == measured[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ('{"runtime": "x"}', "size: Field required; make it with prunekit profile"),
        ('{"runtime": "x", "size": [3, 8, 8], "format": 2, "unit": "s"}', "has format 2"),
        ('{"runtime": "x", "size": [3, 8, 8], "variants": [{"kept": {}, "ms": 0}]}', "variants.0.ms: "),
    ],
)
def test_unusable_files_are_named(tmp_path, text, words):
    file = tmp_path / "table.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(PlanError, match=words):
        LatencyTable.read(file)


def test_table_of_another_model_is_refused(measured):
    model, groups, table = measured
    few = table.model_copy(update={"variants": table.variants[:5]})
    with pytest.raises(PlanError, match="5 measured variants; measure at least 10"):
        SizeModel(model, groups, SHAPE, few)
    for other in ({"conv": 1}, {**table.variants[0].kept, "conv": 10_000}):
        changed = table.model_copy(update={"variants": [*table.variants, Variant(kept=other, ms=1.0)]})
        with pytest.raises(PlanError, match="is one of another model"):
            SizeModel(model, groups, SHAPE, changed)
