"""A run folder as tables in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from prunekit.config.yaml import parse
from prunekit.errors import CheckpointError, RunFolderError
from prunekit.reporting import run_contents, run_repr
from prunekit.reporting.run_contents import COUNTERS, PARTS, Example
from prunekit.reporting.validators import SIZE, describe_problem
from prunekit.runs.artifacts import METRICS, RECIPE, ArtifactStore
from prunekit.runs.run_dir import RunDir
from prunekit.runs.stage_order import STAGES, stage_that_writes, training_position
from prunekit.runs.state import STATE, SUMMARY
from prunekit.utils.io import os_error_reason

__all__ = ["COUNTERS", "PARTS", "Example", "Run", "load_run"]

_STATUSES = ("running", "complete", "interrupted", "failed")
_NOT_THERE = ": not there"
_TRIES = 3  # while a run goes on


@dataclass(frozen=True, repr=False)
class Run:
    """What a run folder holds. Every value is of the kind that stands here: what was of another was left out, and is
    named in ``missing``.

    Attributes:
        name: the folder's name.
        path: the folder.
        status: running, complete, interrupted, failed or unknown.
        summary: ``summary.json``; a part whose stage has not run is absent.
        size: height and width, in pixels, of the image that the summary's MACs are counted on; None where nobody says.
        layers: a row for each layer and branch, in the order of the network: ``layer``, ``branch`` and, for each
            of channels, params, macs, paper_flops, fvcore_macs and thop_macs, ``<quantity>_before`` and ``…_after``.
        counters: a row for each model (dense, slim) and counter (ours, fvcore, thop, torch): ``params``, ``macs``.
        metrics: a row for each epoch of each training: ``stage``, ``epoch``, ``step``, ``loss``, ``penalty``,
            ``lambda``, ``lr``, ``alive``, ``of``, ``seconds``; the metrics of the task are columns ``metrics.<name>``,
            and with a budget there are ``size.<measure>`` and ``budget.<measure>``.
        plan: ``plan.json``, or None.
        recipe: ``recipe.yaml``.
        missing: what is not there, damaged or at odds, a line each.
        layers_size: as ``size``, of the MACs in ``layers`` and ``counters``.
        gates: effective gates over sparse training, float32: a row for each epoch (from 1) and a column for each
            (norm, channel); while training goes on, those of its newest training state.
        curves: baseline, dense, slim, finetuned → what can be drawn: for saliency 256 values each of ``precision``,
            ``recall`` and ``f``; for classification ``classes`` and the ``confusion`` matrix.
        gallery: validation images, with the paths of the pictures; these are not read.
        environment: ``environment.json``.
        classes: the names of the classes, where there are any.
        bench: a row for each measurement of speed: ``model``, ``form``, ``batch``, ``size`` (64×64), ``threads``,
            ``device``, ``median_ms``, ``p10_ms``, ``p90_ms``, ``peak_mb``.
        evals: a row for each set that a model was measured on by ``prunekit eval``: ``name``, ``model``, ``mode``,
            ``folder``, ``images``, ``skipped``, ``seconds`` and ``metrics.<name>``.
        done: the stages that are done.
    """

    name: str
    path: Path
    status: str
    summary: dict[str, Any]
    size: tuple[int, int] | None
    layers: pd.DataFrame
    counters: pd.DataFrame
    metrics: pd.DataFrame
    plan: dict[str, Any] | None
    recipe: dict[str, Any]
    missing: list[str]
    layers_size: tuple[int, int] | None = None
    gates: pd.DataFrame = field(default_factory=run_contents.empty_gates)
    curves: dict[str, dict[str, Any]] = field(default_factory=dict)
    gallery: list[Example] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    bench: pd.DataFrame = field(default_factory=pd.DataFrame)
    evals: pd.DataFrame = field(default_factory=pd.DataFrame)
    done: list[str] = field(default_factory=list)

    def setting(self, key: str) -> Any:
        """A value of the recipe by its dotted key, such as ``data.size``; None where the recipe has none."""
        value: Any = self.recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def __repr__(self) -> str:
        return run_repr.as_text(self)

    def _repr_html_(self) -> str:
        return run_repr.as_html(self)


def load_run(path: str | Path) -> Run:
    """Read a run folder: complete, going on, broken off, or with damaged files.

    Raises:
        RunFolderError: the folder is no run folder, cannot be read, or needs a newer prunekit.
    """
    path = Path(path)
    for _ in range(_TRIES):
        before = _state(path)
        run = _load(path)
        # A file that was replaced after the state was read does not fit the checksum there.
        if before == _state(path) or all(line.endswith(_NOT_THERE) for line in run.missing):
            break
    return run


def _state(path: Path) -> bytes | None:
    try:
        return (path / STATE).read_bytes()
    except OSError:
        return None


def _load(path: Path) -> Run:
    files, state = _open(path)
    read = _Reader(files)
    if state is not None:
        read.missing.append(state)
    recipe = read(RECIPE, lambda _: _recipe(files.read_text(RECIPE)), {})
    summary = read.json(SUMMARY, run_contents.summary, {})
    status, done = files.status if isinstance(files, RunDir) else "unknown", _done(files)
    status = status if status in _STATUSES else summary.get("status", "unknown")
    over = status not in ("running", "interrupted")
    read.stages = set(summary.get("seconds", ())) if status == "complete" else set()
    metrics = read(
        METRICS, lambda faults: run_contents.metrics(files.read_bytes(METRICS), faults, over), pd.DataFrame()
    )
    plan = read.json("plan.json", run_contents.plan, None)
    nothing = run_contents.empty_layers(), run_contents.empty_counters(), None
    layers, counters, layers_size = read.json("layers.json", lambda value, _: run_contents.layers(value), nothing)
    run = Run(
        name=files.path.resolve().name,
        path=files.path,
        status=status if status in _STATUSES else "unknown",
        summary=summary,
        size=_size(recipe) or layers_size,
        layers=layers,
        counters=counters,
        metrics=metrics,
        plan=plan,
        recipe=recipe,
        missing=read.missing,
        layers_size=layers_size,
        gates=_gates(read, done),
        curves=read.json("curves.json", run_contents.curves, {}),
        gallery=read.json("gallery/index.json", lambda value, faults: _gallery(read, value, faults), []),
        environment=read.json("environment.json", run_contents.environment, {}),
        classes=read.json("classes.json", run_contents.classes, [], optional=True),
        bench=read.json("bench.json", run_contents.bench, pd.DataFrame(), optional=True),
        evals=read.json("eval.json", run_contents.evals, pd.DataFrame(), optional=True),
        done=done,
    )
    run.missing.extend(_unread(read))
    run.missing.extend(_at_odds(run))
    return run


def _open(path: Path) -> tuple[ArtifactStore, str | None]:
    """The folder; where its state is damaged, what can be read without one, and what is wrong with it."""
    try:
        run = RunDir.open(path)
        return run, None if (path / STATE).is_file() else f"{STATE}: not there, so nothing vouches for the other files"
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {os_error_reason(error)}; mend its permissions") from error
    except CheckpointError as error:
        fault = f"{STATE}: {_one_line(error)}; nothing vouches for the other files"
    except RecursionError:
        fault = f"{STATE} or {SUMMARY}: nested too deep, so nothing vouches for the other files"
    return ArtifactStore(path, {"checksums": {}}, None), fault


def _done(files: ArtifactStore) -> list[str]:
    return files.done if isinstance(files, RunDir) else []


class _Reader:
    """Reads files, and notes which of them are not there or damaged.

    Attributes:
        missing: what is to be said of them.
        read: their names.
        stages: those that a run which is complete has done itself; empty where that is not known.
    """

    def __init__(self, files: ArtifactStore):
        self.files = files
        self.missing: list[str] = []
        self.read: set[str] = set()
        self.stages: set[str] = set()

    def __call__(self, name: str, how: Callable[[list[str]], Any], otherwise: Any, optional: bool = False) -> Any:
        faults: list[str] = []
        self.read.add(name)
        try:
            if not (self.files.path / name).exists():
                if name in self.files.written() or not (optional or self._elsewhere(name)):
                    self.missing.append(f"{name}{_NOT_THERE}")
                return otherwise
            value = how(faults)
        except CheckpointError as error:
            self.missing.append(f"{name}: {_one_line(error)}")
            return otherwise
        except Exception as error:
            # What bytes that something else has written can make a parser raise is not for us to list.
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            self.missing.append(f"{name}: not as prunekit writes it ({kind}{_one_line(error)})")
            return otherwise
        if faults:
            self.missing.append(
                f"{name}: left out what is not as prunekit writes it ({_one_line(describe_problem(faults))})"
            )
        return value

    def _elsewhere(self, name: str) -> bool:
        """Whether this file stands in the run that this one began from, whose stages were not done again."""
        by = stage_that_writes(name)
        if by is None or not self.stages:
            return False
        # Fine-tuning adds to the lines of training.
        return not self.stages & ({by, "finetune"} if name == METRICS else {by})

    def json(self, name: str, check: Callable[[Any, list[str]], Any], otherwise: Any, optional: bool = False) -> Any:
        return self(name, lambda faults: check(self.files.read_json(name), faults), otherwise, optional)


def _one_line(text: object) -> str:
    # Of control characters too: these lines go to terminals.
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", str(text)).split())


def _gallery(read: _Reader, value: Any, faults: list[str]) -> list[Example]:
    """The examples, without the pictures that are damaged or of another run."""
    examples = run_contents.gallery(value, read.files.path / "gallery", faults)
    for example in examples:
        for part, path in list(example.files.items()):
            name = f"gallery/{path.name}"
            read.read.add(name)
            try:
                read.files.read_bytes(name)
            except CheckpointError:
                faults.append(f"{path.name} is damaged")
                del example.files[part]
    return examples


def _unread(read: _Reader) -> Iterator[str]:
    """What is wrong with the files that a report does not show: weights, exports."""
    for name in read.files.written():
        if name in read.read:
            continue
        if not (read.files.path / name).exists():
            yield f"{name}{_NOT_THERE}"
            continue
        try:
            read.files.read_bytes(name)
        except CheckpointError as error:
            yield f"{name}: {_one_line(error)}"


def _recipe(text: str) -> dict[str, Any]:
    document = parse(text)
    if document.problems:
        raise ValueError(f"line {document.problems[0].line}: {document.problems[0].message}")
    if not isinstance(document.value, dict):
        raise ValueError("it is no mapping")
    return document.value


def _size(recipe: dict[str, Any]) -> tuple[int, int] | None:
    data = recipe.get("data")
    side = data.get("size") if isinstance(data, dict) else None
    return (int(side), int(side)) if SIZE.fits(side) else None


def _gates(read: _Reader, done: list[str]) -> pd.DataFrame:
    if "train" not in done and not (read.files.path / "gates.npz").exists():
        training = _gates_of_training(read.files)
        if len(training):
            return training
    return read(
        "gates.npz", lambda _: run_contents.gates(read.files.read_arrays("gates.npz")), run_contents.empty_gates()
    )


def _gates_of_training(files: ArtifactStore) -> pd.DataFrame:
    """Those of the newest training state; that may be replaced while it is read, and then the one before has to do."""
    prefix = "gates/"
    states = files.states()
    for step in states.steps("train"):
        try:
            tensors, _ = states.read("train", step)
            held = {name.removeprefix(prefix): rows for name, rows in tensors.items() if name.startswith(prefix)}
            return run_contents.gates(held)
        except Exception:
            # As in _Reader; a state that cannot be read is no loss, the run goes on from the one before it too.
            continue
    return run_contents.empty_gates()


def _at_odds(run: Run) -> list[str]:
    """What does not agree among files that are each as they should be: one of them is of another run, or cut short."""
    found = []
    complete = run.status == "complete"
    for model in ("dense", "slim"):
        ours = run.counters[(run.counters["model"] == model) & (run.counters["counter"] == "ours")]["params"].dropna()
        params = run.summary.get(model, {}).get("params")
        if len(ours) and params is not None and int(ours.iloc[0]) != params:
            found.append(
                f"layers.json: its {model} model has {int(ours.iloc[0]):,} parameters, that of {SUMMARY} {params:,}; "
                "one of the two is of another run"
            )
    if complete and run.summary and not any(part in run.summary for part in PARTS):
        found.append(f"{SUMMARY}: the run is complete, and there is no model in it")
    counts: dict[str, int] = {}
    for stage, rows in run.metrics.groupby("stage", sort=False) if len(run.metrics) else ():
        epochs = rows["epoch"].tolist()
        counts[str(stage)] = len(epochs)
        if epochs != list(range(1, len(epochs) + 1)):
            found.append(f"{METRICS}: the epochs of {stage} are not 1, 2, 3 and so on")
    # The training of a run that was derived from another one stands in that one.
    here = {"finetune", *run.summary.get("seconds", ())}
    for stage, key in (("train", "train.epochs"), ("baseline", "train.epochs"), ("finetune", "finetune.epochs")):
        wanted, held, of = run.setting(key), counts.get(stage, 0), STAGES[training_position(stage)[0]]
        own = held or (of in here and (stage != "baseline" or run.setting("baseline")))
        if own and of in run.done and isinstance(wanted, int) and held < wanted:
            found.append(f"{METRICS}: {held} of {wanted} epochs of {stage}")
    if len(run.gates) and "train" in run.done and counts.get("train") and len(run.gates) != counts["train"]:
        found.append(f"gates.npz: {len(run.gates)} epochs, {METRICS} has {counts['train']} of train")
    return found
