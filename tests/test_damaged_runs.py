"""Every file of a run folder cut short, with a bit flipped, emptied, swapped for another run's or gone, read by every
command: the command names the file, or does what it would have done without the damage.

With PRUNEKIT_SOAK set all files are tried with all damages and commands (``make soak``); without it each with a few.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_run import change_state
from rich.console import Console
from toy_run import outcome, quiet, shorten, toy_recipe, write_photos

from prunekit import benching
from prunekit.benching import bench_run
from prunekit.deploy.timing import Timing
from prunekit.errors import PrunekitError
from prunekit.evaluation import evaluate
from prunekit.exchange import derived_recipe
from prunekit.exporting import export_run
from prunekit.inspection import dump, inspect_groups
from prunekit.pipeline import finetune_run, run_recipe, slim_run
from prunekit.prediction import predict
from prunekit.reporting import report
from prunekit.rundir import RunDir

SOAK = int(os.environ.get("PRUNEKIT_SOAK", "0"))


@dataclass
class Bed:
    """What the tests lie on: a finished run and one that was broken off, each with another beside it."""

    photos: Path
    recipe: object
    whole: Path
    other: Path
    broken: Path
    other_broken: Path


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        patch.setattr(benching, "measure", lambda jobs, _: ([Timing([1.0], 1.0, 1.0, 1.0) for _ in jobs], {1: 1.0}))
        yield


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    here = tmp_path_factory.mktemp("runs")
    photos = write_photos(here / "photos")
    recipe = toy_recipe(photos)
    # Of another seed: every file fits, and is another one.
    others = toy_recipe(photos, "seed=1", "train.epochs=3")
    for name, one in (("whole", recipe), ("other", others)):
        run_recipe(one, here / name / "toy", quiet())
        evaluate(here / name / "toy", [f"photos={photos}"], quiet())
        bench_run(here / name / "toy", quiet(), forms="eager", threads="1")
    for name, one in (("broken", recipe), ("other_broken", others)):
        break_off(one, here / name / "toy")
    return Bed(photos, recipe, *(here / name / "toy" for name in ("whole", "other", "broken", "other_broken")))


def break_off(recipe, out: Path) -> None:
    """Kill a run in its second epoch."""
    append = RunDir.append_metrics

    def second(run, line):
        if line["epoch"] == 2:
            raise KeyboardInterrupt
        append(run, line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "append_metrics", second)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, out, quiet())


# ---- what is done to a file


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES: dict[str, Callable[[bytes, bytes], bytes | None]] = {
    "cut": lambda data, other: data[: len(data) // 2],
    "flipped": lambda data, other: flipped(data, len(data) // 2),
    "emptied": lambda data, other: b"",
    "swapped": lambda data, other: other,
    "gone": lambda data, other: None,
}


def damaged(folder: Path, other: Path, name: str, damage: str, to: Path) -> Path:
    copy = Path(shutil.copytree(folder, to, symlinks=True))
    data = (copy / name).read_bytes()
    theirs = (other / name).read_bytes() if (other / name).is_file() else data[::-1]
    new = DAMAGES[damage](data, theirs)
    if new is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(new)
    return copy


def files_of(folder: Path) -> list[str]:
    """One of a kind; all files in a soak of 2 and more."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != "lock")
    if SOAK > 1:
        return names
    pictures = [name for name in names if name.startswith("gallery/") and name.endswith(".png")]
    return [name for name in names if not name.startswith("report/") and name not in pictures[1:]]


# ---- what reads it


def _told(run: Path, bed: Bed) -> str:
    console = Console(width=400, file=io.StringIO(), color_system=None)
    report([run], run.parent / "report", console)
    return console.file.getvalue().replace(str(run.parent), "")


def _predict(run: Path, bed: Bed) -> bytes:
    (table,) = predict(run, sorted(bed.photos.rglob("*.png")), run.parent / "maps", console=quiet())
    return table.read_bytes()


def _eval(run: Path, bed: Bed) -> object:
    entries = evaluate(run, [f"again={bed.photos}"], quiet())
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


def _bench(run: Path, bed: Bed) -> object:
    return bench_run(run, quiet(), forms="eager", threads="1")


def _slim(run: Path, bed: Bed) -> object:
    out = slim_run(run, derived_recipe(run, ["slim.threshold=0.45"]), run.parent / "slim", quiet())
    return outcome(out)


def _finetune(run: Path, bed: Bed) -> object:
    out = finetune_run(run, derived_recipe(run, ["finetune.batch_size=5"]), run.parent / "finetuned", quiet())
    return outcome(out)


def _gone_on(run: Path, bed: Bed, start_from: str | None = None) -> object:
    """What has come of the run, or what its report says of files that the run itself does not need."""
    console = Console(width=400, file=io.StringIO(), color_system=None)
    run_recipe(bed.recipe, run, console, resume=True, start_from=start_from)
    told = [one for one in console.file.getvalue().splitlines() if one.startswith(("wrong in", "missing in"))]
    return "\n".join(told) or outcome(run)


READERS: dict[str, Callable[[Path, Bed], object]] = {
    "report": _told,
    "predict": _predict,
    "groups": lambda run, bed: dump(inspect_groups(str(run))).replace(str(run), ""),
    "eval": _eval,
    "export": lambda run, bed: [path.read_bytes() for path in export_run(run, "onnx", quiet())],
    "bench": _bench,
    "slim": _slim,
    "finetune": _finetune,
    "resume": _gone_on,
    "again": lambda run, bed: _gone_on(run, bed, "finetune"),
}


@pytest.fixture(scope="module")
def good(bed, tmp_path_factory):
    """What each command gives for the undamaged run; made when it is asked for."""
    made: dict[str, object] = {}

    def of(reader: str) -> object:
        if reader not in made:
            run = tmp_path_factory.mktemp(reader) / "toy"
            made[reader] = READERS[reader](Path(shutil.copytree(bed.whole, run)), bed)
        return made[reader]

    return of


def verdict(name: str, reader: str, call: Callable[[], object], wanted: object) -> str:
    """ "the same" or "told"; all else is a wrong result."""
    try:
        result = call()
    except PrunekitError as error:
        text = str(error)
        assert name in text, (name, reader, text)
        assert "\n" not in text, text
        return "told"
    if result == wanted:
        return "the same"
    assert isinstance(result, str) and reader in ("report", "resume", "again"), (name, reader)
    assert name.removeprefix("gallery/") in result, (name, reader, result)
    return "told"


def cases(names: list[str]) -> list[tuple[str, str, str]]:
    """File, damage, command."""
    if SOAK:
        return [(name, damage, reader) for name in names for damage in DAMAGES for reader in READERS]
    kinds, cheap = list(DAMAGES), ["report", "predict", "groups", "eval", "export"]
    out = []
    for number, name in enumerate(names):
        out += [(name, damage, "report") for damage in ("swapped", kinds[number % len(kinds)])]
        out += [(name, kinds[(number + 1) % len(kinds)], cheap[1 + number % 4])]
    return out


def test_no_damage_makes_a_wrong_result(bed, good, tmp_path, capsys):
    tried, wrong = cases(files_of(bed.whole)), []
    found = {"told": 0, "the same": 0}
    for number, (name, damage, reader) in enumerate(tried):
        here = tmp_path / str(number)
        run = damaged(bed.whole, bed.other, name, damage, here / "toy")
        try:
            found[verdict(name, reader, lambda: READERS[reader](run, bed), good(reader))] += 1  # noqa: B023
        except Exception as error:
            wrong.append((name, damage, reader, f"{type(error).__name__}: {error}"[:300]))
        shutil.rmtree(here)
    if SOAK:
        with capsys.disabled():
            print(f"\ndamage: {len(tried)} damaged folders read: {found['told']} told, {found['the same']} as without")
    assert not wrong and found["told"] and found["the same"]


# The files that a command cannot do without, each with it.
NEEDED = [
    ("finetuned/model.safetensors", "predict"),
    ("plan.json", "predict"),
    ("recipe.yaml", "predict"),
    ("classes.json", "eval"),
    ("finetuned/model.safetensors", "export"),
    ("dense/model.safetensors", "slim"),
    ("slim/model.safetensors", "finetune"),
    ("summary.json", "resume"),
    ("recipe.yaml", "slim"),
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name, reader", NEEDED)
def test_what_is_needed_is_asked_for_by_name(bed, tmp_path, name, reader, damage):
    run = damaged(bed.whole, bed.other, name, damage, tmp_path / "toy")
    if (run / name).is_file() and (run / name).read_bytes() == (bed.whole / name).read_bytes():
        pytest.skip("the other run has the same")
    with pytest.raises(PrunekitError) as error:
        READERS[reader](run, bed)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_no_damage_to_a_run_that_was_broken_off_changes_its_end(bed, tmp_path, capsys):
    wanted, names = outcome(bed.whole), files_of(bed.broken)
    kinds = list(DAMAGES)
    tried = [(n, d) for k, n in enumerate(names) for d in (kinds if SOAK else [kinds[(k + 3) % 5]])]
    found = {"told": 0, "the same": 0}
    for number, (name, damage) in enumerate(tried):
        run = damaged(bed.broken, bed.other_broken, name, damage, tmp_path / str(number) / "toy")
        found[verdict(name, "resume", lambda: READERS["resume"](run, bed), wanted)] += 1  # noqa: B023
        shutil.rmtree(run.parent)
    if SOAK:
        with capsys.disabled():
            print(
                f"\ndamage: {len(tried)} broken-off runs went on: {found['told']} told, {found['the same']} to the end"
            )
    assert found["told"] and found["the same"]


@pytest.mark.parametrize("name", ["dense/model.safetensors", "model.onnx", "finetuned/model.safetensors"])
def test_a_report_names_what_it_does_not_show(bed, tmp_path, name):
    run = damaged(bed.whole, bed.other, name, "flipped", tmp_path / "toy")
    assert f"wrong in /toy: {name}: " in _told(run, bed)
    (run / name).unlink()
    assert f"missing in /toy: {name}\n" in _told(run, bed)


def test_a_training_state_of_another_run_is_not_gone_on_from(bed, tmp_path, caplog):
    run = Path(shutil.copytree(bed.broken, tmp_path / "toy"))
    for path in (run / "checkpoints").iterdir():
        shutil.copy(bed.other_broken / "checkpoints" / path.name, path)
    run_recipe(bed.recipe, run, quiet(), resume=True)
    assert "train-0002 is damaged (it is of another run)" in caplog.text
    assert outcome(run) == outcome(bed.whole)


@pytest.mark.parametrize("name", ["finetuned/model.safetensors", "plan.json", "summary.json", "recipe.yaml"])
def test_a_state_that_came_along_with_another_runs_file_does_not_speak_for_it(bed, tmp_path, name):
    run = Path(shutil.copytree(bed.whole, tmp_path / "toy"))
    for one in ("state.json", name):
        shutil.copy(bed.other / one, run / one)
    assert "of another run" in _told(run, bed) or "not those that were written" in _told(run, bed)
    for reader in ("predict", "groups", "again"):
        with pytest.raises(PrunekitError, match=r"state\.json vouches for|is damaged|another recipe"):
            READERS[reader](run, bed)


def test_a_plan_and_weights_of_two_runs_do_not_go_together(bed, tmp_path):
    run = Path(shutil.copytree(bed.whole, tmp_path / "toy"))
    (run / "state.json").unlink()
    shutil.copy(bed.other / "plan.json", run)
    with pytest.raises(PrunekitError, match=r"plan\.json was not made from .*dense/model\.safetensors.*--from extract"):
        _predict(run, bed)


def test_a_recipe_that_was_edited_is_not_taken_for_the_runs(bed, tmp_path):
    run = Path(shutil.copytree(bed.whole, tmp_path / "toy"))
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("threshold: 0.5", "threshold: 0.4"))
    for reader in ("predict", "groups", "slim", "finetune", "resume", "export"):
        with pytest.raises(PrunekitError, match=r"recipe\.yaml.*edited.*put the old one back.*--out DIR") as error:
            READERS[reader](run, bed)
        assert "\n" not in str(error.value)
    assert not [name for name in ("slim", "finetuned") if (tmp_path / name).exists()], "asked before anything is made"
    with pytest.raises(PrunekitError, match="edited"):
        export_run(run, "onnx", quiet(), overrides=[f"data.root={bed.photos}"])
    # Which is the way that is proposed.
    from prunekit.recipe import load

    assert load(run / "recipe.yaml").slim.threshold == 0.4
    (run / "recipe.yaml").write_text(text)
    _predict(run, bed)


def test_a_run_can_be_made_again_as_the_message_says(bed, tmp_path):
    run = Path(shutil.copytree(bed.whole, tmp_path / "toy"))
    for name, stage in (("slim/model.safetensors", "slim"), ("metrics.jsonl", "train"), ("plan.json", "extract")):
        (run / name).write_bytes(b"{")
        with pytest.raises(PrunekitError, match=f"--from {stage}"):
            run_recipe(bed.recipe, run, quiet(), resume=True, start_from="finetune")
        run_recipe(bed.recipe, run, quiet(), resume=True, start_from=stage)
        found = outcome(run)
        assert found == {k: v for k, v in outcome(bed.whole).items() if k in found}
    (run / "state.json").write_bytes(b"{")
    with pytest.raises(PrunekitError, match=r"state\.json is damaged.*remove it and go on with --resume"):
        run_recipe(bed.recipe, run, quiet(), resume=True)
    (run / "state.json").unlink()
    run_recipe(bed.recipe, run, quiet(), resume=True)
    found = outcome(run)
    assert found["finetuned/model.safetensors"] == outcome(bed.whole)["finetuned/model.safetensors"]


def older(run: Path) -> Path:
    """The folder as a prunekit has left it that knew nothing of runs' ids, of checksums of the state and of metrics."""
    state = json.loads((run / "state.json").read_text())
    del state["checksums"]["metrics.jsonl"]
    text = json.dumps({k: v for k, v in state.items() if k not in ("run", "check", "replacing")})
    (run / "state.json").write_text(text)
    for path in (run / "checkpoints").glob("*.json"):
        written = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in written.items() if k != "run"}))
    return run


@pytest.mark.parametrize("reader", READERS if SOAK else ["report", "predict", "eval", "finetune", "again"])
def test_a_folder_of_an_older_prunekit_is_read(bed, good, tmp_path, reader):
    found = READERS[reader](older(Path(shutil.copytree(bed.whole, tmp_path / "toy"))), bed)
    wanted = good(reader)
    assert found == wanted or {**wanted, **found} == wanted


def test_a_run_that_an_older_prunekit_broke_off_goes_on(bed, tmp_path):
    run = older(Path(shutil.copytree(bed.broken, tmp_path / "toy")))
    # It knew fewer keys, too.
    lines = [line for line in (run / "recipe.yaml").read_text().splitlines() if "shrink_every" not in line]
    assert len(lines) < len((run / "recipe.yaml").read_text().splitlines())
    (run / "recipe.yaml").write_text("\n".join([*lines, ""]))
    sums = json.loads((run / "state.json").read_text())["checksums"]
    del sums["recipe.yaml"]
    held = json.loads((run / "state.json").read_text())
    (run / "state.json").write_text(json.dumps({**held, "checksums": sums}))
    run_recipe(bed.recipe, run, quiet(), resume=True)
    found, wanted = outcome(run), outcome(bed.whole)
    assert {k: v for k, v in found.items() if k != "recipe.yaml"} == {k: wanted[k] for k in found if k != "recipe.yaml"}


# ---- formats

ABSURD = ["x", -1, 0, 1e999, None, True, 1.5, [], {}]


def with_format(run: Path, name: str, value: object) -> None:
    """As if prunekit had written it."""
    path = run / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": value}))
    if name.startswith("checkpoints") or name == "state.json":
        return
    sums = json.loads((run / "state.json").read_text())["checksums"]
    change_state(run, checksums={k: v for k, v in sums.items() if k != name})


FORMATS = {
    "state.json": ("predict", "report", "resume", "again"),
    "summary.json": ("predict", "report", "resume"),
    "plan.json": ("predict", "groups", "report"),
    "eval.json": ("eval", "report"),
    "bench.json": ("report",),
    "layers.json": ("report",),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_newer_format_is_refused_with_what_it_needs(bed, tmp_path, name):
    run = Path(shutil.copytree(bed.whole, tmp_path / "toy"))
    with_format(run, name, 2)
    for reader in FORMATS[name]:
        try:
            text = READERS[reader](run, bed)
        except PrunekitError as error:
            text = str(error)
            assert "\n" not in text
        said = next(line for line in text.splitlines() if "format 2" in line)
        assert "up to 1" in said and "pip install --upgrade prunekit" in said, said
        assert name in said or "written by prunekit" in said


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_that_never_was_is_damage(bed, tmp_path, name):
    run = Path(shutil.copytree(bed.whole, tmp_path / "toy"))
    for value in ABSURD:
        with_format(run, name, value)
        for reader in FORMATS[name][: None if SOAK else 2]:
            try:
                text = READERS[reader](run, bed)
            except PrunekitError as error:
                text = str(error)
                assert "\n" not in text
            assert name in text, (value, reader, text)


def test_a_newer_training_state_is_not_passed_over(bed, tmp_path):
    run = Path(shutil.copytree(bed.broken, tmp_path / "toy"))
    with_format(run, "checkpoints/train-0002.json", 2)
    with pytest.raises(PrunekitError, match=r"train-0002 has format 2.*pip install --upgrade") as error:
        run_recipe(bed.recipe, run, quiet(), resume=True)
    assert "\n" not in str(error.value)


def test_a_key_of_a_newer_recipe_is_told(bed, tmp_path):
    run = Path(shutil.copytree(bed.whole, tmp_path / "toy"))
    (run / "recipe.yaml").write_text("novelty: 3\n" + (run / "recipe.yaml").read_text())
    sums = json.loads((run / "state.json").read_text())["checksums"]
    change_state(run, checksums={k: v for k, v in sums.items() if k != "recipe.yaml"}, prunekit="9.1")
    with pytest.raises(PrunekitError, match=r"does not know the key novelty.*written by prunekit 9\.1"):
        _predict(run, bed)
