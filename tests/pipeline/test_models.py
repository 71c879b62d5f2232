"""Models in run folders."""

import torch
from helpers.small_run import small_run

from prunekit.config import registry
from prunekit.pipeline import models
from prunekit.pipeline.models import load_model, read_recipe
from prunekit.runs.run_dir import RunDir


def test_groups_of_a_builder_are_found_once(tmp_path, monkeypatch):
    run = RunDir.open(small_run(tmp_path / "run"))
    find, calls = models.find_groups, []
    monkeypatch.setattr(models, "_known_groups", {})
    monkeypatch.setattr(models, "find_groups", lambda *args: calls.append(1) or find(*args))
    slim, again = load_model(run, "slim"), load_model(run, "slim")
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(slim.parameters(), again.parameters(), strict=True))
    # Another builder may take the name.
    builder = registry.backbones.get(read_recipe(run).backbone.name)
    monkeypatch.setattr(registry.backbones, "get", lambda name: lambda **options: builder(**options))
    load_model(run, "slim")
    assert len(calls) == 2
