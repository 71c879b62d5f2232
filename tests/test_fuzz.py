"""Whatever stands in a file or on the command line, its reader returns or says in one sentence what is wrong.

With PRUNEKIT_SOAK=N in the environment: N million inputs in all.
"""

import json
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import CORPUS, changed, fuzz, kept
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import small_run

from prunekit import state, yaml12
from prunekit.backbones.csnet import csnet
from prunekit.checkpoints import CheckpointStore
from prunekit.decoding import decode_arrays, decode_json, decode_tensors
from prunekit.errors import PrunekitError
from prunekit.files import sha256
from prunekit.interop.csnet import Layout, export_csnet
from prunekit.interop.pickles import read_checkpoint, read_layout, write_layout
from prunekit.plan import Plan
from prunekit.recipe import load
from prunekit.reporting import load_run
from prunekit.rundir import RunDir

SOAK = int(os.environ.get("PRUNEKIT_SOAK", "0"))
# Inputs of a million, by how long one takes.
SHARES = {
    "yaml": 40_000,
    "recipe": 15_000,
    "override": 10_000,
    "plan": 400_000,
    "summary": 5_000,
    "metrics": 60_000,
    "state": 60_000,
    "checkpoint": 50_000,
    "tensors": 150_000,
    "gates": 150_000,
    "layout": 55_000,
    "pth": 10_000,
}
SHORT = {"recipe": 40, "override": 40, "summary": 20, "pth": 60}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder with one file of each kind."""
    path = small_run(tmp_path_factory.mktemp("runs") / "tiny")
    with RunDir.open(path, write=True) as run:
        run.write_arrays("gates.npz", {"conv.norm": np.ones((2, 3), np.float32), "out": np.zeros((2, 1), np.float32)})
        for epoch in (1, 2):
            line = {"stage": "train", "epoch": epoch, "step": 9, "loss": 0.5, "penalty": 0.1, "alive": 3, "of": 4}
            run.append_metrics({**line, "metrics": {"top1": 0.5}, "seconds": 1.5})
        tensors = {"model/w": np.ones((2, 3), np.float32), "optimizer/0/step": np.array(3.0)}
        run.save_checkpoint("train", 9, tensors, {"epoch": 1, "step": 9, "steering": {"weight": 0.5}}, keep=1)
    return path


@pytest.fixture(scope="module")
def readers(folder, tmp_path_factory):
    """Name → (reader of bytes, seeds)."""
    place = tmp_path_factory.mktemp("fuzz")
    recipes = [p.read_bytes() for p in sorted(Path(__file__).parents[1].glob("recipes/*.yaml"))]
    summary, plan = (json.loads((folder / name).read_bytes()) for name in ("summary.json", "plan.json"))
    plan["groups"] = dict(list(plan["groups"].items())[:6])

    def unvouched(copy: str) -> RunDir:
        """The run as one of an earlier prunekit or a stranger, whose files nothing speaks for."""
        path = Path(shutil.copytree(folder, place / copy))
        held = {key: value for key, value in state.fresh().items() if key not in ("run", "check")}
        (path / state.STATE).write_text(json.dumps({**held, "done": ["train"]}))
        return RunDir.open(path)

    loose = unvouched("loose")

    def through(name, read):
        path = loose.path / name

        def reader(data: bytes) -> None:
            path.write_bytes(data)
            read(path)

        return reader

    def checkpoint(data: bytes) -> None:
        """A stranger's checksums are right: half of the inputs go into the tensors, half into the JSON."""
        store = CheckpointStore(place / "checkpoints")
        store.folder.mkdir(exist_ok=True)
        written = json.loads(next((folder / "checkpoints").glob("*.json")).read_bytes())
        if data[:1] == b"{":
            (store.folder / "train-0009.json").write_bytes(data)
            tensors = next((folder / "checkpoints").glob("*.safetensors")).read_bytes()
        else:
            tensors = data
            (store.folder / "train-0009.json").write_text(json.dumps({**written, "sha256": sha256(data)}))
        (store.folder / "train-0009.safetensors").write_bytes(tensors)
        store.read("train", 9)

    def decoded(decode, use=lambda value: None):
        """As run folders do it, without the folder."""

        def reader(data: bytes) -> None:
            try:
                value = decode(data)
            except ValueError as error:
                raise PrunekitError(f"damaged ({error})") from error
            use(value)

        return reader

    def override(data: bytes) -> None:
        load("digits_resnet", [data.decode(errors="surrogateescape")])

    def yaml(data: bytes) -> None:
        """What it finds is no exception; here it counts as refused."""
        if yaml12.parse(data).problems:
            raise PrunekitError("problems")

    files = [p.read_bytes() for p in sorted((folder / "checkpoints").iterdir())]
    layout = write_layout(export_csnet(csnet(10))[1].dump())
    torch.save({"state_dict": {"w": torch.ones(2, 3), "b": torch.zeros(2)}}, place / "seed.pth")
    return {
        "yaml": (yaml, recipes),
        "recipe": (through("recipe-in.yaml", load), recipes),
        "override": (override, [b"train.epochs=3", b"data.root=~/x", b"train.optimizer={name: adam, options: {}}"]),
        "plan": (
            decoded(decode_json, Plan.from_json),
            [json.dumps(plan).encode(), json.dumps({**plan, "groups": {"a": 3, "b": [0, 2]}}).encode()],
        ),
        "summary": (through("summary.json", lambda _: load_run(loose.path)), [json.dumps(summary).encode()]),
        "metrics": (
            through("metrics.jsonl", lambda _: loose.read_metrics()),
            [(folder / "metrics.jsonl").read_bytes()],
        ),
        "state": (through(state.STATE, lambda _: state.read(loose.path)), [(folder / state.STATE).read_bytes()]),
        "checkpoint": (checkpoint, files),
        "tensors": (decoded(decode_tensors), [path.read_bytes() for path in folder.rglob("*.safetensors")]),
        "gates": (decoded(decode_arrays), [(folder / "gates.npz").read_bytes()]),
        "layout": (through("layout.bin", lambda path: Layout.parse(read_layout(path), "layout.bin")), [layout]),
        "pth": (through("in.pth.tar", read_checkpoint), [(place / "seed.pth").read_bytes()]),
    }


@pytest.mark.parametrize("name", SHARES)
def test_only_our_errors_come_out(readers, name, tmp_path, capsys):
    reader, seeds = readers[name]
    seeds = [*seeds, *kept(name)]
    count = int(SOAK * SHARES[name]) if SOAK else SHORT.get(name, 300)
    began = time.perf_counter()
    found = fuzz(reader, seeds, count + len(seeds), seed=int(os.environ.get("PRUNEKIT_FUZZ_SEED", "0")))
    took = time.perf_counter() - began
    if SOAK:
        with capsys.disabled():
            print(
                f"\nfuzz {name}: {found.inputs} inputs, {found.read} read, {found.refused} refused, "
                f"{found.inputs / took:.0f} a second, the slowest {found.slowest:.2f} s"
            )
        for data, _ in found.failures:
            (tmp_path / sha256(data)[:12]).write_bytes(data)
    assert not found.failures, f"{len(found.failures)} failures, kept in {tmp_path}: {found.failures[:3]}"
    # A report says what is damaged and shows the rest.
    assert found.refused > 0 or name == "summary"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=1000 * SOAK or 60, deadline=None)
@given(json_values, st.sampled_from(["groups", "removed", "builder", "splits", "carriers", "format", "added_bias"]))
def test_a_plan_of_anything(value, key):
    for data in (value, {"format": 1, "groups": {}, key: value}):
        try:
            Plan.from_json(data)
        except PrunekitError as error:
            assert str(error).strip()


@settings(max_examples=1000 * SOAK or 30, deadline=None)
@given(st.text(max_size=30), json_values)
def test_an_override_of_anything(key, value):
    for text in (key, f"{key}={value}", f"train.{key}={value}", f"train.epochs={key}", f"data.root={key}"):
        try:
            load("digits_resnet", [text])
        except PrunekitError as error:
            assert str(error).strip()


def test_the_fuzzer_finds_what_breaks():
    def reader(data: bytes) -> None:
        if b"null" in data:
            raise KeyError("it")

    found = fuzz(reader, [b"{}"], 3000)
    assert found.failures and "KeyError" in found.failures[0][1]


def test_changes_are_the_same_for_the_same_seed():
    assert [changed([b"abc"], random.Random(1)) for _ in range(3)] == [changed([b"abc"], random.Random(1))] * 3


def test_the_corpus_is_of_readers_that_are_there():
    assert not CORPUS.is_dir() or {path.name for path in CORPUS.iterdir()} <= set(SHARES)
