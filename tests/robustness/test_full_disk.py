"""A disk that is full or fails: one line says so, the last good state stands, and a run goes on from it once there is
room again, to the same end.

With PRUNEKIT_SOAK set every write of a run fails once (``make soak``); without it a few of each kind.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.failing_disk import FailingDisk
from helpers.fake_run import write_run
from helpers.small_run import small_run
from helpers.toy_run import outcome, quiet, shorten, toy_recipe, write_photos
from PIL import Image
from rich.console import Console

from prunekit.cli import main
from prunekit.commands import bench
from prunekit.commands.bench import bench_run
from prunekit.commands.evaluate import evaluate
from prunekit.commands.predict import predict
from prunekit.data.cache import data_folder
from prunekit.deployment.bench.timing import Timing
from prunekit.errors import PrunekitError, WriteError
from prunekit.native import library
from prunekit.pipeline import runner
from prunekit.pipeline.export import export_run
from prunekit.pipeline.runner import run_recipe
from prunekit.reporting import load_run, report
from prunekit.runs.folders import is_run_folder
from prunekit.runs.run_dir import RunDir
from prunekit.utils.io import TEMP_PREFIX

SOAK = int(os.environ.get("PRUNEKIT_SOAK", "0"))
FULL, FAILS = errno.ENOSPC, errno.EIO


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return toy_recipe(write_photos(tmp_path_factory.mktemp("data") / "photos"))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The uninterrupted run, and the system calls that wrote it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with FailingDisk(out) as disk:
        run_recipe(recipe, out, quiet())
    return out, disk.calls


def broken_off(out: Path, recipe, at: int, error: int) -> str | None:
    """Run with a disk that fails at write number ``at``, then resume; return the error message of the first."""
    said = None
    with FailingDisk(out.parent, at, error) as disk:
        try:
            run_recipe(recipe, out, quiet(), resume=is_run_folder(out))
        except PrunekitError as raised:
            said = str(raised)
            assert isinstance(raised, WriteError) and raised.exit_status == 3, raised
            assert "\n" not in said and str(out) in said and os.strerror(error) in said and "--resume" in said
    assert disk.failed
    run_recipe(recipe, out, quiet(), resume=True)
    return said


def moments(calls: list[str]) -> list[tuple[int, int]]:
    """Return the numbers of the writes that fail, and their errors."""
    if SOAK:
        both = [(place, error) for place in range(len(calls)) for error in (FULL, FAILS)]
        # A soak of 1 tests every third case.
        return both if SOAK > 1 else both[::3]
    told = {
        FULL: ["mkdir whole", "pwrite lock", "write checkpoints", "write metrics.jsonl", "replace dense", "report"],
        FAILS: ["replace state.json", "fsync checkpoints", "open run.log", "unlink checkpoints", "replace plan.json"],
    }
    wanted = []
    for error, words in told.items():
        for word in words:
            places = [place for place, call in enumerate(calls) if call.startswith(word) or word in call]
            wanted += [(places[len(places) // 2], error)] if places else []
    return wanted


def test_failed_write_then_resume_gives_same_result(recipe, whole, tmp_path, capsys):
    undisturbed, calls = outcome(whole[0]), whole[1]
    tried = moments(calls)
    told, wrong = 0, []
    for number, (place, error) in enumerate(tried):
        out = tmp_path / str(number) / "whole"
        out.parent.mkdir()
        told += broken_off(out, recipe, place, error) is not None
        if (found := outcome(out)) != undisturbed:
            wrong.append((place, calls[place], error, [k for k in undisturbed if found.get(k) != undisturbed[k]]))
        shutil.rmtree(out.parent)
    with capsys.disabled():
        if SOAK:
            print(f"\nfull disk: {len(tried)} refusals in {len(calls)} writes, {told} ended the run, all went on")
    assert not wrong and told >= len(tried) // 2


@pytest.mark.slow
def test_repeated_failures_then_resume_give_same_result(recipe, whole, tmp_path):
    """The disk is full again after each resume, a little later."""
    out, place, step = tmp_path / "whole", 5, 1 if SOAK else 45
    for _ in range(1000):
        with FailingDisk(tmp_path, place) as disk:
            try:
                run_recipe(recipe, out, quiet(), resume=True)
            except WriteError:
                place += step
                continue
        break
    assert not disk.failed
    assert outcome(out) == outcome(whole[0])


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int):
    """Mount a tmpfs of this size."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", range(8, 400, 4) if SOAK else (16, 100))
def test_real_full_disk(recipe, whole, tmp_path, kilobytes):
    folder = tmp_path / "disk"
    with small_disk(folder, kilobytes):
        try:
            run_recipe(recipe, folder / "whole", quiet())
        except WriteError as error:
            assert "No space left" in str(error) and str(folder) in str(error)
        else:
            assert SOAK, "the disk was meant to be too small"
        subprocess.run(["mount", "-o", "remount,size=16m", str(folder)], check=True)
        run_recipe(recipe, folder / "whole", quiet(), resume=True)
        assert outcome(folder / "whole") == outcome(whole[0])


def test_full_disk_is_one_line_and_exit_status_3(recipe, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    with FailingDisk(tmp_path, 60), pytest.raises(SystemExit) as stop:
        main(["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")])
    err = capsys.readouterr().err
    assert stop.value.code == 3 and err.count("\n") == 1
    assert err.startswith("prunekit: cannot write ") and "No space left on device; free space" in err


def test_unexpected_full_disk_error_is_one_line(monkeypatch, tmp_path, capsys):
    def failing(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/scratch")

    monkeypatch.setattr("prunekit.reporting.report", failing)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path)])
    err = capsys.readouterr().err
    assert stop.value.code == 3 and err.count("\n") == 1 and "/somewhere/scratch: No space left on device" in err


def test_first_error_is_reported(recipe, tmp_path, monkeypatch):
    def interrupted(*_):
        disk.__enter__()
        raise KeyboardInterrupt

    disk = FailingDisk(tmp_path, 0)
    monkeypatch.setitem(runner.STAGE_FUNCTIONS, "train", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, tmp_path / "whole", quiet())
    finally:
        disk.__exit__()
    assert disk.failed > 1 and RunDir.open(tmp_path / "whole").status == "running", "it could not be written"


def test_permission_error_has_exit_status_2(tmp_path):
    folder = write_run(tmp_path / "run", stop="extract")
    with FailingDisk(tmp_path, 0, errno.EACCES), pytest.raises(PrunekitError, match="permissions") as error:
        report([folder], None, quiet())
    assert error.value.exit_status == 2


# ---- optional outputs


def test_unwritable_log_does_not_stop_the_run(recipe, whole, tmp_path):
    console = Console(file=io.StringIO(), record=True, width=400)
    with FailingDisk(tmp_path, 3, only=lambda name: name.endswith("run.log")) as disk:
        run_recipe(recipe, tmp_path / "whole", console)
    assert disk.failed > 3 and console.export_text().count("run.log: No space left on device; continuing") == 1
    assert outcome(tmp_path / "whole") == outcome(whole[0])


@pytest.mark.parametrize("at", [0, 2, 6])
def test_unwritable_image_cache_is_only_reported(recipe, whole, tmp_path, at):
    cached = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache": str(tmp_path / "cache")})})
    console = Console(file=io.StringIO(), record=True, width=400)
    with FailingDisk(tmp_path / "cache", at) as disk:
        run_recipe(cached, tmp_path / "whole", console)
    assert disk.failed and "cannot write decoded images to" in console.export_text()
    ours, theirs = outcome(tmp_path / "whole"), outcome(whole[0])
    for name in ("dense/model.safetensors", "finetuned/model.safetensors", "metrics"):
        assert ours[name] == theirs[name]
    kept = data_folder(str(tmp_path / "cache"))
    assert not kept.exists() or (not list(kept.glob("*.json")) and not list(kept.glob(f"{TEMP_PREFIX}*")))


def test_unwritable_kernel_cache_is_only_reported(tmp_path, monkeypatch):
    if not shutil.which("g++"):
        pytest.skip("no compiler")
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "FLAGS", ("-shared", "-fPIC", "-fopenmp", "-std=c++17", "-march=native"))
    for at in (0, 2, 5, 7):
        with FailingDisk(tmp_path / "cache", at) as disk, pytest.raises(library.NoKernels, match="No space left"):
            library._load()
        assert disk.failed
        assert not list(tmp_path.rglob("*.so"))


def test_damaged_kernels_are_rebuilt(tmp_path, monkeypatch):
    if not shutil.which("g++"):
        pytest.skip("no compiler")
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "FLAGS", ("-shared", "-fPIC", "-fopenmp", "-std=c++17", "-march=native"))
    library._load()
    (path,) = tmp_path.rglob("*.so")
    good = path.read_bytes()
    for place in (len(good) // 2, len(good) - 1):
        path.unlink()  # The library loaded by this process stays.
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        assert not library._is_intact(path)
        library._load()
        assert library._is_intact(path)


# ---- the other commands


def _bench(run: Path, out: Path) -> None:
    bench_run(run, quiet(), forms="eager", threads="1", seconds=0.01)


COMMANDS = {
    "predict": lambda run, out: predict(
        run, sorted(out.glob("photos/*/*.png")), out / "maps", None, quiet(), overwrite=True
    ),
    "eval": lambda run, out: evaluate(run, [f"a={out / 'photos'}"], quiet()),
    "export": lambda run, out: export_run(run, "onnx", quiet()),
    "bench": _bench,
    "report": lambda run, out: report([run], None, quiet()),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("runs") / "small")


@pytest.mark.parametrize("name", COMMANDS)
def test_failed_command_leaves_existing_files(small, tmp_path, name, monkeypatch):
    def measured(jobs, *_):
        timing = Timing([1.0], 1.0, 1.0, 1.0)
        return [timing for _ in jobs], {1: 1.0}, False

    monkeypatch.setattr(bench, "measure", measured)
    for digit in range(10):
        (tmp_path / "photos" / str(digit)).mkdir(parents=True)
        Image.new("RGB", (8, 8), (digit * 20, 0, 0)).save(tmp_path / "photos" / str(digit) / f"{digit}.png")
    run = shutil.copytree(small, tmp_path / "run")
    COMMANDS[name](run, tmp_path)
    with FailingDisk(tmp_path) as disk:
        COMMANDS[name](run, tmp_path)
    there, count = tree(tmp_path).keys(), len(disk.calls)
    assert count > 1
    refused = 0
    for at in range(count) if SOAK else sorted({0, 1, count // 2, count - 2}):
        with FailingDisk(tmp_path, at) as disk, contextlib.suppress(WriteError):
            COMMANDS[name](run, tmp_path)
            assert not disk.failed, (at, disk.calls)
        refused += disk.failed > 0
        assert tree(tmp_path).keys() == there
        # Each file is the old or the new one.
        assert load_run(run).problems == load_run(small).problems
    # The number of writes varies: a file with the same content needs no new checksum.
    assert refused > 1
    COMMANDS[name](run, tmp_path)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_maps_are_written_atomically(tmp_path):
    from prunekit.data.images import write_image

    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for at in range(3):
        with FailingDisk(tmp_path, at), pytest.raises(WriteError):
            write_image(tmp_path / "map.png", levels)
        assert list(tmp_path.iterdir()) == []


def test_tracker_write_error_is_one_line(recipe, whole, tmp_path):
    pytest.importorskip("tensorboard")
    tracked = recipe.model_copy(update={"log": "tensorboard"})
    with FailingDisk(tmp_path, 1, only=lambda name: "tensorboard" in name), pytest.raises(WriteError) as error:
        run_recipe(tracked, tmp_path / "whole", quiet())
    assert "tensorboard" in str(error.value) and "\n" not in str(error.value)
    run_recipe(tracked, tmp_path / "whole", quiet(), resume=True)
    ours, theirs = outcome(tmp_path / "whole"), outcome(whole[0])
    assert ours["finetuned/model.safetensors"] == theirs["finetuned/model.safetensors"]
