"""Every file of a run folder cut short, with a bit flipped, emptied, swapped for another run's or gone, read by every
command: the command names the file, or does what it would have done without the damage.

With PRUNEKIT_SOAK set all files are tried with all damages and commands (``make soak``); without it each with a few.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.run_readers import READERS, predicted, printed_report
from helpers.toy_run import outcome, quiet

from prunekit.errors import PrunekitError
from prunekit.pipeline.export import export_run
from prunekit.pipeline.runner import run_recipe

SOAK = int(os.environ.get("PRUNEKIT_SOAK", "0"))


# ---- kinds of damage


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
    """Return one file of each kind; all files in a soak of 2 or more."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != "lock")
    if SOAK > 1:
        return names
    pictures = [name for name in names if name.startswith("gallery/") and name.endswith(".png")]
    return [name for name in names if not name.startswith("report/") and name not in pictures[1:]]


def verdict(name: str, reader: str, call: Callable[[], object], wanted: object) -> str:
    """Return "the same" or "told"; anything else is a wrong result."""
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
    """Return triples of file, damage and command."""
    if SOAK:
        return [(name, damage, reader) for name in names for damage in DAMAGES for reader in READERS]
    kinds, cheap = list(DAMAGES), ["report", "predict", "groups", "eval", "export"]
    out = []
    for number, name in enumerate(names):
        out += [(name, damage, "report") for damage in ("swapped", kinds[number % len(kinds)])]
        out += [(name, kinds[(number + 1) % len(kinds)], cheap[1 + number % 4])]
    return out


def test_damaged_file_never_gives_wrong_result(run_set, good, tmp_path, capsys):
    tried, wrong = cases(files_of(run_set.whole)), []
    found = {"told": 0, "the same": 0}
    for number, (name, damage, reader) in enumerate(tried):
        here = tmp_path / str(number)
        run = damaged(run_set.whole, run_set.other, name, damage, here / "toy")
        try:
            found[verdict(name, reader, lambda: READERS[reader](run, run_set), good(reader))] += 1  # noqa: B023
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
    ("finetuned/plan.json", "predict"),
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
def test_required_damaged_file_is_named(run_set, tmp_path, name, reader, damage):
    run = damaged(run_set.whole, run_set.other, name, damage, tmp_path / "toy")
    if (run / name).is_file() and (run / name).read_bytes() == (run_set.whole / name).read_bytes():
        pytest.skip("the other run has the same")
    with pytest.raises(PrunekitError) as error:
        READERS[reader](run, run_set)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "damage", "reader"),
    [("recipe.yaml", "gone", "groups"), ("state.json", "swapped", "eval"), ("state.json", "gone", "again")],
)
def test_message_names_a_file_that_another_one_depends_on(run_set, tmp_path, name, damage, reader):
    run = damaged(run_set.whole, run_set.other, name, damage, tmp_path / "toy")
    assert verdict(name, reader, lambda: READERS[reader](run, run_set), None) == "told"


def test_resume_of_damaged_run_is_refused_or_gives_same_result(run_set, tmp_path, capsys):
    wanted, names = outcome(run_set.whole), files_of(run_set.broken)
    kinds = list(DAMAGES)
    tried = [(n, d) for k, n in enumerate(names) for d in (kinds if SOAK else [kinds[(k + 3) % 5]])]
    found = {"told": 0, "the same": 0}
    for number, (name, damage) in enumerate(tried):
        run = damaged(run_set.broken, run_set.other_broken, name, damage, tmp_path / str(number) / "toy")
        found[verdict(name, "resume", lambda: READERS["resume"](run, run_set), wanted)] += 1  # noqa: B023
        shutil.rmtree(run.parent)
    if SOAK:
        with capsys.disabled():
            print(
                f"\ndamage: {len(tried)} broken-off runs went on: {found['told']} told, {found['the same']} to the end"
            )
    assert found["told"] and found["the same"]


@pytest.mark.parametrize("name", ["dense/model.safetensors", "model.onnx", "finetuned/model.safetensors"])
def test_report_names_damaged_files_it_does_not_show(run_set, tmp_path, name):
    run = damaged(run_set.whole, run_set.other, name, "flipped", tmp_path / "toy")
    assert f"problem in /toy: {name}: " in printed_report(run, run_set)
    (run / name).unlink()
    assert f"missing in /toy: {name}\n" in printed_report(run, run_set)


def test_checkpoint_of_another_run_is_not_resumed(run_set, tmp_path, caplog):
    run = Path(shutil.copytree(run_set.broken, tmp_path / "toy"))
    for path in (run / "checkpoints").iterdir():
        shutil.copy(run_set.other_broken / "checkpoints" / path.name, path)
    run_recipe(run_set.recipe, run, quiet(), resume=True)
    assert "train-0002 is damaged (it belongs to another run)" in caplog.text
    assert outcome(run) == outcome(run_set.whole)


@pytest.mark.parametrize("name", ["finetuned/model.safetensors", "finetuned/plan.json", "summary.json", "recipe.yaml"])
def test_state_copied_from_another_run_is_detected(run_set, tmp_path, name):
    run = Path(shutil.copytree(run_set.whole, tmp_path / "toy"))
    for one in ("state.json", name):
        shutil.copy(run_set.other / one, run / one)
    assert "of another run" in printed_report(run, run_set) or "its checksum is wrong" in printed_report(run, run_set)
    for reader in ("predict", "groups", "again"):
        with pytest.raises(PrunekitError, match=r"checksum in state\.json|is damaged|another recipe"):
            READERS[reader](run, run_set)


def test_plan_and_weights_of_two_runs_are_refused(run_set, tmp_path):
    run = Path(shutil.copytree(run_set.whole, tmp_path / "toy"))
    (run / "state.json").unlink()
    shutil.copy(run_set.other / "finetuned/plan.json", run / "finetuned")
    with pytest.raises(
        PrunekitError, match=r"finetuned/plan\.json was not made from .*dense/model\.safetensors.*--from extract"
    ):
        predicted(run, run_set)


def test_edited_recipe_is_refused(run_set, tmp_path):
    run = Path(shutil.copytree(run_set.whole, tmp_path / "toy"))
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("threshold: 0.5", "threshold: 0.4"))
    for reader in ("predict", "groups", "slim", "finetune", "resume", "export"):
        with pytest.raises(PrunekitError, match=r"recipe\.yaml.*edited.*put the old one back.*--out DIR") as error:
            READERS[reader](run, run_set)
        assert "\n" not in str(error.value)
    assert not [name for name in ("slim", "finetuned") if (tmp_path / name).exists()], (
        "checked before anything is written"
    )
    with pytest.raises(PrunekitError, match="edited"):
        export_run(run, "onnx", quiet(), overrides=[f"data.root={run_set.photos}"])
    # This is the proposed remedy.
    from prunekit.config.recipe import load

    assert load(run / "recipe.yaml").slim.threshold == 0.4
    (run / "recipe.yaml").write_text(text)
    predicted(run, run_set)


def test_proposed_remedies_work(run_set, tmp_path):
    run = Path(shutil.copytree(run_set.whole, tmp_path / "toy"))
    for name, stage in (("slim/model.safetensors", "slim"), ("metrics.jsonl", "train"), ("slim/plan.json", "slim")):
        (run / name).write_bytes(b"{")
        with pytest.raises(PrunekitError, match=f"--from {stage}"):
            run_recipe(run_set.recipe, run, quiet(), resume=True, start_from="finetune")
        run_recipe(run_set.recipe, run, quiet(), resume=True, start_from=stage)
        found = outcome(run)
        assert found == {k: v for k, v in outcome(run_set.whole).items() if k in found}
    (run / "extract/plan.json").write_bytes(b"{")
    with pytest.raises(PrunekitError, match=r"extract/plan\.json is damaged.*--from extract"):
        run_recipe(run_set.recipe, run, quiet(), resume=True, start_from="slim")
    run_recipe(run_set.recipe, run, quiet(), resume=True, start_from="extract")
    assert outcome(run) == {k: v for k, v in outcome(run_set.whole).items() if k in outcome(run)}
    (run / "state.json").write_bytes(b"{")
    with pytest.raises(PrunekitError, match=r"state\.json is damaged.*remove it and continue with --resume"):
        run_recipe(run_set.recipe, run, quiet(), resume=True)
    (run / "state.json").unlink()
    run_recipe(run_set.recipe, run, quiet(), resume=True)
    found = outcome(run)
    assert found["finetuned/model.safetensors"] == outcome(run_set.whole)["finetuned/model.safetensors"]
