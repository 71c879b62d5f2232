"""The readers to fuzz: every one that reads untrusted files."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.fuzz_engine import Reader, json_within, png_within, reshape, zip_within
from prunekit.config import recipe, schema
from prunekit.config import yaml as yaml12
from prunekit.data.images import read_image, read_mask
from prunekit.errors import PrunekitError
from prunekit.interop.csnet import CSNetLayout
from prunekit.interop.pickles import read_checkpoint, read_layout
from prunekit.pruning.plan import Plan
from prunekit.reporting import run_contents
from prunekit.reporting.loader import _read_recipe, _Reader
from prunekit.runs import state as states
from prunekit.runs.artifacts import ArtifactStore
from prunekit.runs.checkpoint_store import CheckpointStore
from prunekit.runs.run_dir import RunDir
from prunekit.utils.io import encode_json, sha256
from prunekit.utils.safe_decode import decode_json

SPLIT = b"\n----\n"
KEYS = (
    b"format",
    b"groups",
    b"layers",
    b"size",
    b"params",
    b"macs",
    b"metrics",
    b"stage",
    b"epoch",
    b"before",
    b"after",
)
YAML = (b"- ", b"? ", b"&a ", b"*a", b"!!int ", b"!!python/object:os.system ", b"<<: ", b"| ", b"> ", b"%YAML 1.1\n")
PICKLE = tuple(
    bytes([code])
    for code in b"(.0123FIJKLMNPQRSTUVX]abcdeghijlopqrstu}\x80\x81\x85\x86\x87\x88\x89\x8a\x8b\x8c\x93\x95\x96"
)
RECIPE_KEYS = (b"backbone:", b"data:", b"train:", b"slim:", b"target:", b"options:", b"name: ", b"file: ", b"base: ")


class Place:
    """A folder, in memory if possible, for inputs that must be files."""

    def __init__(self) -> None:
        shm = Path("/dev/shm")
        self.path = Path(tempfile.mkdtemp(prefix="prunekit-fuzz-", dir=shm if shm.is_dir() else None))

    def put(self, name: str, data: bytes) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def readers(place: Place) -> list[Reader]:
    logging.getLogger("prunekit").setLevel(logging.ERROR)
    files = ArtifactStore(place.path, {"checksums": {}}, None)

    def of_report(name: str, check: Callable[[Any, list[str]], Any]) -> Callable[[bytes], object]:
        """Read a file as the report does, which drops invalid values, and as commands do."""

        def read(data: bytes) -> None:
            place.put(name, data)
            _Reader(files).read_json(name, check, None)
            files.read_json(name)

        return read

    def yaml(data: bytes) -> None:
        document = yaml12.parse(data)
        if not document.problems:
            # A loaded recipe can be dumped and loaded again.
            assert yaml12.parse(yaml12.dump(document.value)).value == document.value

    def a_recipe(data: bytes) -> None:
        recipe.load(place.put("r.yaml", data), untrusted=True)

    def resolved(data: bytes) -> None:
        place.put("recipe.yaml", data)
        _Reader(files).read("recipe.yaml", lambda _: _read_recipe(files.read_text("recipe.yaml")), {})

    def overrides(data: bytes) -> None:
        texts = data.decode(errors="surrogateescape").split("\n")
        if not any("file" in text for text in texts):  # It would be trusted and run.
            recipe.load("csnet", texts)

    def state(data: bytes) -> None:
        with contextlib.suppress(ValueError, PrunekitError, RecursionError, AttributeError):
            # An attacker can forge the checksum.
            data = states.encode(decode_json(data))
        place.put("run/recipe.yaml", b"name: a\n")
        place.put("run/state.json", data)
        run = RunDir.open(place.path / "run")
        assert isinstance(run.status, str) and isinstance(run.done, list)

    def metrics(data: bytes) -> None:
        place.put("metrics.jsonl", data)
        _Reader(files).read(
            "metrics.jsonl", lambda f: run_contents.read_metrics(files.read_bytes("metrics.jsonl"), f, True), None
        )
        files.read_metrics()

    def gates(data: bytes) -> None:
        place.put("gates.npz", data)
        _Reader(files).read("gates.npz", lambda _: run_contents.read_gates(files.read_arrays("gates.npz")), None)
        files.read_arrays("gates.npz")

    def tensors(data: bytes) -> None:
        place.put("model.safetensors", data)
        files.read_tensors("model.safetensors")

    def checkpoint(data: bytes) -> None:
        told, _, arrays = data.partition(SPLIT)
        try:
            # An attacker can forge the checksums.
            body = encode_json(decode_json(told), "state", indent=None)
            sums = {"format": 1, "sha256": sha256(arrays), "state_sha256": sha256(body), "state": decode_json(told)}
            told = encode_json(sums, "state", indent=None)
        except (ValueError, PrunekitError, RecursionError):
            pass
        place.put("checkpoints/train-0001.json", told)
        place.put("checkpoints/train-0001.safetensors", arrays)
        CheckpointStore(place.path / "checkpoints").load("train")

    def layout(data: bytes) -> None:
        path = place.put("a.bin", data)
        CSNetLayout.parse(read_layout(path), str(path))

    def published(data: bytes) -> None:
        read_checkpoint(place.put("a.pth.tar", data))

    def image(data: bytes) -> None:
        path = place.put("a.png", data)
        for read in (read_image, read_mask):
            try:
                read(path)
            except PrunekitError as error:
                assert "\n" not in str(error)
                last = error
            else:
                last = None
        if last is not None:
            raise last

    def plan(data: bytes) -> None:
        place.put("plan.json", data)
        _Reader(files).read_json("plan.json", run_contents.read_plan, None)
        Plan.from_json(files.read_json("plan.json"))

    def gallery(value: Any, faults: list[str]) -> Any:
        return run_contents.read_gallery(value, place.path / "gallery", faults)

    of = {
        "summary": run_contents.read_summary,
        "layers": lambda value, _: run_contents.read_layers(value),
        "curves": run_contents.read_curves,
        "gallery": gallery,
        "environment": run_contents.read_environment,
        "classes": run_contents.read_classes,
        "bench": run_contents.read_bench,
        "eval": run_contents.read_evals,
    }

    def yaml_within(chance: random.Random, data: bytes) -> bytes:
        held = yaml12.parse(data)
        return data if held.problems else json.dumps(reshape(chance, held.value)).encode()

    def checkpoint_within(chance: random.Random, data: bytes) -> bytes:
        told, _, arrays = data.partition(SPLIT)
        return json_within(chance, told) + SPLIT + arrays

    def tensors_within(chance: random.Random, data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        head = json_within(chance, data[8 : 8 + length])
        return len(head).to_bytes(8, "little") + head + data[8 + length :]

    def override_within(chance: random.Random, data: bytes) -> bytes:
        keys = [".".join(path) for path in schema.all_keys() if path[-1] != "file"]
        values = [json.dumps(reshape(chance, {"name": "adam", "options": [1]})) for _ in range(3)]
        return "\n".join(f"{chance.choice(keys)}={value}" for value in values).encode()

    yamls, pickles = (*YAML, *RECIPE_KEYS), PICKLE
    arrays = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"<f8", b"|O", b"'shape': (")
    images = (b"IHDR", b"IDAT", b"tRNS", b"\xff\xda", b"\xff\xc2", b"\xff\xe1", b"II*\0")
    return [
        Reader("yaml", yaml, YAML, yaml_within, 200, 60_000),
        Reader("recipe", a_recipe, yamls, yaml_within, 100, 20_000),
        Reader("resolved", resolved, yamls, yaml_within, 100, 40_000),
        Reader("overrides", overrides, (b"=", b".", *yamls), override_within, 60, 10_000),
        Reader("plan", plan, KEYS, json_within, 400, 120_000),
        Reader("state", state, KEYS, json_within, 400, 80_000),
        *(Reader(name, of_report(f"{name}.json", check), KEYS, json_within, 200, 60_000) for name, check in of.items()),
        Reader("metrics", metrics, KEYS, json_within, 200, 50_000),
        Reader("gates", gates, arrays, zip_within, 400, 100_000),
        Reader("tensors", tensors, (b"F32", b"BF16", b"F8_E4M3", b"data_offsets"), tensors_within, 400, 100_000),
        Reader("checkpoint", checkpoint, (SPLIT, *KEYS), checkpoint_within, 200, 60_000),
        Reader("layout", layout, pickles, None, 400, 100_000),
        Reader("published", published, pickles, zip_within, 200, 60_000),
        Reader("image", image, images, png_within, 300, 80_000),
    ]
