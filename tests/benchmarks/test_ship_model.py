import ship_model
import torch

from prunekit import weights
from prunekit.config.recipe import load
from prunekit.pipeline.models import build_dense, load_model, save_model
from prunekit.runs.run_dir import RunDir


def test_folder_and_card_of_a_run(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    recipe = load(
        "csnet", ["backbone.options.width=20", "data={name: folder, size: 32}", f"data.root={tmp_path}/photos"]
    )
    environment = {
        "prunekit": "1",
        "packages": {},
        "device": "cpu",
        "seed": 0,
        "commit": "abcdef012",
        "command": ["/x"],
    }
    with RunDir.start(tmp_path / "run", recipe.dump(), environment) as run:
        save_model(run, "slim", build_dense(recipe))
        run.update_summary("slim", {"params": 12345, "macs": 2_000_000})
        run.write_json("layers.json", {"layers": []})
        run.add_seconds("train", 7200)
        metrics = {"max_f": 0.5, "mae": 0.25, "s_measure": 0.75, "max_e": 1.0}
        sets = [
            {"name": name, "images": 3, "mode": f"size {size}", "metrics": metrics}
            for name, size in (("A", 32), ("B", 64))
        ]
        run.write_json("eval.json", {"format": 1, "sets": sets})
    monkeypatch.setattr(ship_model, "WEIGHTS", tmp_path / "weights")
    folder = ship_model.ship(tmp_path / "run", "tiny")
    card = (folder / weights.CARD).read_text()
    assert (
        "# tiny" in card
        and "12,345 parameters, 2 M multiply-adds at 32×32" in card
        and "2.0 hours on one CPU core" in card
    )
    assert "| A | 3 | 0.5000 | 0.2500 | 0.7500 | 1.0000 |" in card and "| B |" not in card
    shipped = RunDir.open(folder)
    assert shipped.status == "complete" and "command" not in shipped.read_json("environment.json")
    assert str(tmp_path) not in "".join(
        p.read_text() for p in folder.rglob("*") if p.suffix in (".yaml", ".json", ".md")
    )
    ours, theirs = (load_model(one, "slim").state_dict() for one in (shipped, run))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
