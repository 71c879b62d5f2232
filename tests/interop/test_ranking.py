from pathlib import Path

import numpy as np
import pytest
import torch

from prunekit.data.datasets import image_tensor, normalize, resize
from prunekit.data.images import read_image
from prunekit.interop.csnet import CSNetLayout, import_csnet
from prunekit.interop.pickles import read_checkpoint, read_layout
from prunekit.pruning.graph.gate_expr import gate_scores
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.surgery.equivalence import zero_dead_gates

SHARED = Path(__file__).parents[2].parent / "shared"
FILES = SHARED / "reference" / "csnet-L-x2"
pytestmark = pytest.mark.skipif(not FILES.is_dir(), reason="the published files are not in ../shared")


def smallest_gate(model, group):
    gates = [model.get_submodule(gate.norm).weight.detach().abs()[slice(*gate.slice)] for gate in group.gates]
    return torch.stack(gates).amin(0).double().numpy()


def test_effective_gate_ranks_channels_better_than_raw_gates_and_chance():
    """Removes 5% and 10% of the channels by each ranking, and compares how much the maps of photographs change."""
    layout = CSNetLayout.parse(read_layout(FILES / "csnet-L-x2.bin"), "layout")
    _, _, model = import_csnet(read_checkpoint(FILES / "csnet-L-x2.pth.tar"), layout, "checkpoint")
    photographs = sorted((SHARED / "data" / "DUTS-TE-200" / "images").iterdir())[:4]
    images = torch.cat([normalize(resize(image_tensor(read_image(path)), (224, 224))) for path in photographs])
    groups = [group for group in find_groups(model, images) if group.reason is None]
    effective = np.concatenate([gate_scores(model, group) for group in groups])
    alive = effective > 0
    rankings = {
        "effective": effective,
        "raw": np.concatenate([smallest_gate(model, group) for group in groups]),
        "chance": np.random.default_rng(0).random(len(effective)),
    }
    bounds = np.cumsum([group.channels for group in groups])[:-1]
    with torch.inference_mode():
        before = model.eval()(images).sigmoid()
        for share in (0.05, 0.10):
            moved = {}
            for name, values in rankings.items():
                cut = np.zeros(len(values), bool)
                cut[np.argsort(np.where(alive, values, np.inf), kind="stable")[: int(share * alive.sum())]] = True
                dead = {
                    g.id: np.flatnonzero(part).tolist() for g, part in zip(groups, np.split(cut, bounds), strict=True)
                }
                moved[name] = float((zero_dead_gates(model, groups, dead)(images).sigmoid() - before).abs().mean())
            assert moved["effective"] < 0.5 * min(moved["raw"], moved["chance"]), (share, moved)
