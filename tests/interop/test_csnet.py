import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.marks import seeds
from helpers.networks import init_norms, small_csnet, zero_gates

from prunekit.backbones.csnet import csnet
from prunekit.data.datasets import image_tensor, normalize, resize
from prunekit.data.images import read_image
from prunekit.errors import CheckpointError, ExportError
from prunekit.flops import count_modules, total
from prunekit.interop.csnet import SUBNORMAL, CSNetLayout, export_csnet, import_csnet
from prunekit.interop.pickles import read_checkpoint, read_layout
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Plan
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.surgery.plan_builder import make_plan
from prunekit.pruning.surgery.slim import apply_plan, slim

SHARED = Path(__file__).parents[2].parent / "shared"
FILES = SHARED / "reference" / "csnet-L-x2"
published = pytest.mark.skipif(not FILES.is_dir(), reason="the published files are not in ../shared")


@pytest.fixture(scope="module")
def files():
    layout = CSNetLayout.parse(read_layout(FILES / "csnet-L-x2.bin"), "layout")
    return read_checkpoint(FILES / "csnet-L-x2.pth.tar"), layout


def settled(width=20, seed=0, share=0.0, whole=0.0):
    torch.manual_seed(seed)
    model = csnet(width)
    example = init_norms(model, seed)
    groups = find_groups(model, example)
    zero_gates(model, groups, share, seed, whole)
    return model, groups, example


def same(a, b):
    own, other = a.state_dict(), b.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


@published
def test_published_model_gives_its_golden_logits(files):
    width, _plan, model = import_csnet(*files, "checkpoint")
    assert width == 40 and total(count_modules(model, (3, 224, 224))[0]) == {
        "params": 140_894,
        "macs": 496_355_104,
        "paper_flops": 718_394_292,
    }
    golden = np.load(FILES / "golden_logits.npz")
    assert len(golden) == 6
    for name in golden:
        if name.startswith("sine"):
            height, width = map(int, name.removeprefix("sine_").split("x"))
            row, col, c = np.meshgrid(*map(np.arange, (height, width, 3)), indexing="ij")
            x = torch.from_numpy(np.sin(0.1 * row + 0.2 * col + c).astype(np.float32)).permute(2, 0, 1)[None]
        else:
            image = read_image(SHARED / "data" / "DUTS-TE-200" / "images" / f"{name}.jpg")
            x = normalize(resize(image_tensor(image), (224, 224)))
        with torch.inference_mode():
            gap = np.abs(model(x).numpy().reshape(golden[name].shape) - golden[name]).max()
        assert gap <= 1e-4, name


@published
def test_published_files_round_trip(files):
    _, plan, model = import_csnet(*files, "checkpoint")
    state, layout = export_csnet(model)
    assert {name: tuple(v.shape) for name, v in state.items()} == {name: tuple(v.shape) for name, v in files[0].items()}
    again = CSNetLayout.parse(layout.dump(), "again")
    assert again == files[1]
    _, second, model_again = import_csnet(state, again, "again")
    assert second == plan and same(model, model_again)
    for name, value in state.items():
        torch.testing.assert_close(value, files[0][name], rtol=2e-7, atol=2e-38)


@published
def test_subnormal_weights_become_zero(files):
    assert sum(int(((v != 0) & (v.abs() < SUBNORMAL)).sum()) for v in files[0].values() if v.is_floating_point()) > 1000
    _, _, model = import_csnet(*files, "checkpoint")
    for name, value in model.named_parameters():
        assert not ((value != 0) & (value.abs() < SUBNORMAL)).any(), name


@pytest.mark.parametrize("width", [20, 40])
def test_dense_model_round_trip_without_layout(width):
    model, _, _ = settled(width)
    state, layout = export_csnet(model)
    found, plan, again = import_csnet(state, None, "file")
    # Division by 100 and multiplication may change the last digit of weights that were never published.
    assert found == width and plan is None
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-7, atol=0, msg=name)
    assert import_csnet(state, CSNetLayout.parse(layout.dump(), "x"), "file")[1].removed == []


@pytest.mark.parametrize("seed", seeds(6))
def test_slim_model_round_trip(seed):
    """Odd splits, branches and dilations of no channels."""
    model, groups, example = settled(20, seed, share=0.3 + 0.1 * seed, whole=0.2 * seed)
    small, _ = slim(model, extract(model, groups), example, groups=groups)
    state, layout = export_csnet(small)
    _, plan, again = import_csnet(state, CSNetLayout.parse(layout.dump(), "layout"), "file")
    with torch.inference_mode():
        a, b = small.double()(example.double()), again.double()(example.double())
    assert (a - b).abs().max() < 1e-4 * a.abs().max()
    assert export_csnet(again.float())[1] == layout
    rebuilt = apply_plan(csnet(20), Plan.from_json(plan.to_json()), example)
    rebuilt.load_state_dict(again.float().state_dict())


def test_absent_branch_and_dilation():
    model, groups, example = settled(20)
    dead = {
        "stage1.1.mix.paths.0to0": set(range(10)),
        "head.dilated.branches.1.1": set(range(5)),
        "stage3.2.mix.paths.0to1": set(range(40)),
    }
    small = apply_plan(copy.deepcopy(model), make_plan(model, groups, dead), example)
    state, layout = export_csnet(small)
    assert layout.blocks[1, 1] == ([10, 10], [0, 10]) and layout.dilated[1][0] == 0
    assert "stage1.1.conv1x1.bns.0.weight" not in state and "oct_fuse.ms.convs.1.msconv.1.weight" in state
    _, _, again = import_csnet(state, layout, "file")
    assert {name for name, _ in again.named_modules()} == {name for name, _ in small.named_modules()}


def test_biases_move_into_the_norms_after_them():
    model, _groups, example = settled(20, 1, share=0.5)
    with torch.no_grad():
        for b in "012":
            model.head.dilated.branches[b]["1"].bias = torch.nn.Parameter(
                torch.randn_like(model.head.dilated.branches[b]["1"].weight[:, 0, 0, 0])
            )
        model.stage1[1].mix.paths["1to0"].bias = torch.nn.Parameter(torch.randn(10))
    state, _ = export_csnet(model)
    assert not any("msconv" in key and key.endswith("bias") for key in state)
    _, _, again = import_csnet(state, None, "file")
    with torch.inference_mode():
        a, b = model.eval()(example), again(example)
    assert (a - b).abs().max() < 1e-3 * a.abs().max().clamp(min=1)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("oct_fuse.fuse.conv.weight"), r"lacks oct_fuse\.fuse\.conv\.weight"),
        (lambda state: state.update({"fc.weight": torch.ones(2)}), r"has fc\.weight, which no CSNet"),
        (
            lambda state: state.update({"stage2.1.conv1x1.conv.weight": torch.ones(40, 41, 1, 1)}),
            r"stage2\.1\.conv1x1\.conv\.weight has shape \(40, 41, 1, 1\), the layout needs \(40, 40, 1, 1\)",
        ),
        (
            lambda state: state.update({"stage2.1.conv1x1.bns.0.weight": torch.ones(7)}),
            r"bns\.0\.weight has shape \(7,\), the layout needs \(20,\)",
        ),
        (lambda state: state.update({"stage0.0.conv1x1.conv.weight": torch.ones(23, 3, 3, 3)}), "give its layout"),
    ],
)
def test_mismatched_tensor_is_named(change, message):
    state, _ = export_csnet(settled()[0])
    change(state)
    with pytest.raises(CheckpointError, match=message):
        import_csnet(state, None, "file")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda entries: entries.pop(3), "has 22 entries, this one 21"),
        (lambda entries: entries.__setitem__(-1, [3, 4, 6, 5]), "the numbers of blocks must be"),
        (lambda entries: entries.__setitem__(4, [np.array([1.0, 2.0]), entries[4][1]]), "entry 4 reads"),
        (lambda entries: entries.__setitem__(2, [entries[2][0], np.array([1.5, 2.0])]), "not numbers of channels"),
        (lambda entries: entries.__setitem__(19, entries[19][:2]), "table of branches"),
        (lambda entries: entries.__setitem__(20, [np.array([1.0, 2.0, 3.0]), entries[20][1]]), "do not match each"),
    ],
)
def test_invalid_layouts(change, message):
    entries = CSNetLayout.from_model(csnet(20)).dump()
    entries = [entry if isinstance(entry[0], int) and len(entry) == 4 else list(entry) for entry in entries]
    change(entries)
    with pytest.raises(CheckpointError, match=message):
        CSNetLayout.parse(entries, "layout")


def test_layout_of_another_model():
    state, _ = export_csnet(settled()[0])
    model, groups, example = settled(10, 1, share=0.5)
    small, _ = slim(model, extract(model, groups), example, groups=groups)
    with pytest.raises(CheckpointError, match="the layout needs"):
        import_csnet(state, CSNetLayout.from_model(small), "file")
    wide = CSNetLayout.from_model(csnet(40))
    wide.blocks[1, 0][1][0] = 99
    with pytest.raises(CheckpointError, match="more channels than the ×2 model"):
        import_csnet(state, wide, "file")


def test_only_a_csnet_can_be_exported():
    with pytest.raises(ExportError, match="only a CSNet"):
        export_csnet(torch.nn.Linear(2, 3))
    with pytest.raises(ExportError, match=r"has \[3, 4, 6, 4\] blocks, this model has \[3, 2, 2, 2\]"):
        export_csnet(small_csnet())
