"""Load a run folder as tables in memory."""

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
from prunekit.reporting.run_contents import COUNTERS, MODELS, GalleryImage
from prunekit.reporting.validators import PIXELS, describe_problems
from prunekit.runs.artifacts import METRICS, RECIPE, ArtifactStore
from prunekit.runs.run_dir import RunDir
from prunekit.runs.stage_order import STAGES, stage_that_writes, training_position
from prunekit.runs.state import STATE, SUMMARY
from prunekit.utils.io import os_error_reason
from prunekit.utils.text import one_line

__all__ = ["COUNTERS", "MISSING", "MODELS", "GalleryImage", "Run", "load_run"]

MISSING = ": missing"  # ends the line of a file that does not exist
_STATUSES = ("running", "complete", "interrupted", "failed")
_ATTEMPTS = 3  # while the run is being written


@dataclass(frozen=True, repr=False)
class Run:
    """The contents of a run folder.

    Every value has the documented type: values of another type are dropped and named in ``problems``.

    Attributes:
        name, path: of the folder.
        status: running, complete, interrupted, failed or unknown.
        summary: ``summary.json``; entries of stages that have not run are absent.
        size: height and width in pixels of the image on which the summary's MACs are counted; None if unknown.
        layers: a row per layer and branch, in network order: ``layer``, ``branch`` and, for each of channels, params,
            macs, paper_flops, fvcore_macs and thop_macs, ``<quantity>_before`` and ``<quantity>_after``.
        counters: a row per model (dense, slim) and counter (prunekit, fvcore, thop, torch): ``params``, ``macs``.
        metrics: a row per epoch of each training: ``stage``, ``epoch``, ``step``, ``loss``, ``penalty``, ``lambda``,
            ``lr``, ``alive``, ``of``, ``seconds``; ``metrics.<name>`` for each metric of the task.
        plan: ``slim/plan.json``, or before that stage ``extract/plan.json``; None without either.
        recipe, environment: ``recipe.yaml`` and ``environment.json``.
        problems: files that are missing, damaged or inconsistent, a line each.
        layers_size: as ``size``, for the MACs in ``layers`` and ``counters``.
        gates: effective gates over sparse training, float32: a row per epoch (from 1), a column per (norm, channel);
            during training those of the newest checkpoint.
        curves: model → its curves. Saliency: ``precision``, ``recall`` and ``f``, 256 values each; classification:
            ``classes`` and the ``confusion`` matrix.
        gallery: validation images with the paths of their pictures, which are not read.
        classes: names of the classes, if any.
        bench: a row per latency measurement: ``model``, ``form``, ``batch``, ``size`` (64×64), ``threads``,
            ``device``, ``median_ms``, ``p10_ms``, ``p90_ms``, ``peak_mb``.
        evals: a row per model and dataset measured by ``prunekit eval``: ``name``, ``model``, ``mode``, ``folder``,
            ``images``, ``skipped``, ``seconds`` and ``metrics.<name>``.
        done: completed stages.
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
    problems: list[str]
    layers_size: tuple[int, int] | None = None
    gates: pd.DataFrame = field(default_factory=run_contents.empty_gates)
    curves: dict[str, dict[str, Any]] = field(default_factory=dict)
    gallery: list[GalleryImage] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    bench: pd.DataFrame = field(default_factory=pd.DataFrame)
    evals: pd.DataFrame = field(default_factory=pd.DataFrame)
    done: list[str] = field(default_factory=list)

    def setting(self, key: str) -> Any:
        """Return a recipe value by its dotted key, such as ``data.size``; None if it is not set."""
        value: Any = self.recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def model(self, name: str) -> dict[str, Any]:
        """Return the summary of a model, such as "slim"; empty if it does not exist."""
        return self.summary.get(name) or {}

    def model_metrics(self, name: str) -> dict[str, float]:
        """Return the known metrics of a model."""
        return {key: value for key, value in (self.model(name).get("metrics") or {}).items() if value is not None}

    def __repr__(self) -> str:
        return run_repr.as_text(self)

    def _repr_html_(self) -> str:
        return run_repr.as_html(self)


def load_run(path: str | Path) -> Run:
    """Load a run folder: complete, running, interrupted, or with damaged files.

    Raises:
        RunFolderError: the path is not a run folder, cannot be read, or requires a newer prunekit.
    """
    path = Path(path)
    for _ in range(_ATTEMPTS):
        before = _state_bytes(path)
        run = _load(path)
        # A file replaced after the state was read does not match its checksum.
        if before == _state_bytes(path) or all(line.endswith(MISSING) for line in run.problems):
            break
    return run


def _state_bytes(path: Path) -> bytes | None:
    try:
        return (path / STATE).read_bytes()
    except OSError:
        return None


def _load(path: Path) -> Run:
    files, state_problem = _open(path)
    reader = _Reader(files)
    if state_problem is not None:
        reader.problems.append(state_problem)
    recipe = reader.read(RECIPE, lambda _: _read_recipe(files.read_text(RECIPE)), {})
    summary = reader.read_json(SUMMARY, run_contents.read_summary, {})
    status, done = (files.status, files.done) if isinstance(files, RunDir) else ("unknown", [])
    status = next((s for s in (status, summary.get("status")) if s in _STATUSES), "unknown")
    finished = status not in ("running", "interrupted")
    reader.own_stages = set(summary.get("seconds", ())) if status == "complete" else set()
    metrics = reader.read(
        METRICS, lambda found: run_contents.read_metrics(files.read_bytes(METRICS), found, finished), pd.DataFrame()
    )
    plan_file = "slim/plan.json" if files.has("slim/plan.json") else "extract/plan.json"
    plan = reader.read_json(plan_file, run_contents.read_plan, None)
    none = (*(pd.DataFrame(columns=c) for c in (run_contents.LAYER_COLUMNS, run_contents.COUNTER_COLUMNS)), None)
    layers, counters, layers_size = reader.read_json("layers.json", lambda v, _: run_contents.read_layers(v), none)
    data = recipe.get("data")
    bench = reader.read_json("bench.json", run_contents.read_bench, pd.DataFrame(), optional=True)
    side: Any = data.get("size") if isinstance(data, dict) else None
    run = Run(
        name=files.path.resolve().name,
        path=files.path,
        status=status,
        summary=summary,
        size=(int(side), int(side)) if PIXELS.accepts(side) else layers_size,
        layers=layers,
        counters=counters,
        metrics=metrics,
        plan=plan,
        recipe=recipe,
        problems=reader.problems,
        layers_size=layers_size,
        gates=_read_gates(reader, done),
        curves=reader.read_json("curves.json", run_contents.read_curves, {}),
        gallery=reader.read_json("gallery/index.json", lambda *args: _read_gallery(reader, *args), []),
        environment=reader.read_json("environment.json", run_contents.read_environment, {}),
        classes=reader.read_json("classes.json", run_contents.read_classes, [], optional=True),
        bench=bench if len(bench) else run_contents.bench_of_budget(summary.get("latency", {})),
        evals=reader.read_json("eval.json", run_contents.read_evals, pd.DataFrame(), optional=True),
        done=done,
    )
    run.problems.extend(_problems_of_other_files(reader))
    run.problems.extend(_inconsistencies(run))
    return run


def _open(path: Path) -> tuple[ArtifactStore, str | None]:
    """Open the folder; with a damaged state, return what can be read without one, and the problem."""
    unverified = "the other files cannot be verified by a checksum"
    try:
        run = RunDir.open(path)
        return run, None if (path / STATE).is_file() else f"{STATE}{MISSING}; {unverified}"
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {os_error_reason(error)}; fix its permissions") from error
    except CheckpointError as error:
        problem = f"{STATE}: {_one_line(error)}; {unverified}"
    except RecursionError:
        problem = f"{STATE} or {SUMMARY}: nested too deeply; {unverified}"
    return ArtifactStore(path, {"checksums": {}}, None), problem


class _Reader:
    """Reads the files of a run folder and records problems instead of raising."""

    def __init__(self, files: ArtifactStore):
        self.files = files
        self.problems: list[str] = []
        self.names: set[str] = set()  # of the files read so far
        self.own_stages: set[str] = set()  # that a complete run executed itself; empty if unknown

    def read(self, name: str, decode: Callable[[list[str]], Any], default: Any, optional: bool = False) -> Any:
        """Return ``decode(problems)``, or the default if the file is missing or damaged."""
        problems: list[str] = []
        self.names.add(name)
        try:
            if not (self.files.path / name).exists():
                if name in self.files.recorded_files() or not (optional or self._is_inherited(name)):
                    self.problems.append(f"{name}{MISSING}")
                return default
            value = decode(problems)
        except CheckpointError as error:
            self.problems.append(f"{name}: {_one_line(error)}")
            return default
        except Exception as error:
            # A parser may raise anything on arbitrary bytes.
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            self.problems.append(f"{name}: not in the expected format ({kind}{_one_line(error)})")
            return default
        if problems:
            self.problems.append(f"{name}: ignored invalid content ({_one_line(describe_problems(problems))})")
        return value

    def read_json(
        self, name: str, convert: Callable[[Any, list[str]], Any], default: Any, optional: bool = False
    ) -> Any:
        return self.read(name, lambda problems: convert(self.files.read_json(name), problems), default, optional)

    def _is_inherited(self, name: str) -> bool:
        """Whether the file is in the run that this one was derived from, whose stages were not executed again."""
        stage = stage_that_writes(name)
        if stage is None or not self.own_stages:
            return False
        # Fine-tuning adds lines to those of training.
        return not self.own_stages & ({stage, "finetune"} if name == METRICS else {stage})


def _one_line(text: object) -> str:
    """Return the text in one line, without control characters, which could change the state of a terminal."""
    return one_line(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", str(text)))


def _read_gallery(reader: _Reader, value: Any, problems: list[str]) -> list[GalleryImage]:
    """Return the gallery without pictures that do not match their checksum."""
    images = run_contents.read_gallery(value, reader.files.path / "gallery", problems)
    for image in images:
        for part, path in list(image.files.items()):
            name = f"gallery/{path.name}"
            reader.names.add(name)
            try:
                reader.files.read_bytes(name)
            except CheckpointError:
                problems.append(f"{path.name} is damaged")
                del image.files[part]
    return images


def _problems_of_other_files(reader: _Reader) -> Iterator[str]:
    """Check files that a report does not show: weights, exports."""
    for name in reader.files.recorded_files():
        if name in reader.names:
            continue
        try:
            if (reader.files.path / name).exists():
                reader.files.read_bytes(name)
            else:
                yield f"{name}{MISSING}"
        except CheckpointError as error:
            yield f"{name}: {_one_line(error)}"


def _read_recipe(text: str) -> dict[str, Any]:
    document = parse(text)
    if document.problems:
        raise ValueError(f"line {document.problems[0].line}: {document.problems[0].message}")
    if not isinstance(document.value, dict):
        raise ValueError("it is not a mapping")
    return document.value


def _read_gates(reader: _Reader, done: list[str]) -> pd.DataFrame:
    name, none = "gates.npz", run_contents.empty_gates()
    if "train" not in done and not (reader.files.path / name).exists():
        gates = _gates_of_checkpoint(reader.files)
        if len(gates):
            return gates
    return reader.read(name, lambda _: run_contents.read_gates(reader.files.read_arrays(name)), none)


def _gates_of_checkpoint(files: ArtifactStore) -> pd.DataFrame:
    """Return the gates of the newest readable checkpoint; one may be replaced while it is read."""
    prefix = "gates/"
    checkpoints = files.checkpoints()
    for step in checkpoints.steps("train"):
        try:
            tensors, _ = checkpoints.read("train", step)
            gates = {name.removeprefix(prefix): rows for name, rows in tensors.items() if name.startswith(prefix)}
            return run_contents.read_gates(gates)
        except Exception:  # As in _Reader.read; a resumed run uses the previous checkpoint too.
            continue
    return run_contents.empty_gates()


def _inconsistencies(run: Run) -> Iterator[str]:
    """Find contradictions between valid files: one of them is from another run, or incomplete."""
    for model in ("dense", "slim"):
        rows = run.counters[(run.counters["model"] == model) & (run.counters["counter"] == "prunekit")]
        counted = rows["params"].dropna()
        params = run.model(model).get("params")
        if len(counted) and params is not None and int(counted.iloc[0]) != params:
            yield (
                f"layers.json: its {model} model has {int(counted.iloc[0]):,} parameters, that of {SUMMARY} "
                f"{params:,}; one of the two is from another run"
            )
    if run.status == "complete" and run.summary and not any(model in run.summary for model in MODELS):
        yield f"{SUMMARY}: the run is complete, but the summary contains no model"
    counts: dict[str, int] = {}
    for stage, rows in run.metrics.groupby("stage", sort=False) if len(run.metrics) else ():
        epochs = rows["epoch"].tolist()
        counts[str(stage)] = len(epochs)
        if epochs != list(range(1, len(epochs) + 1)):
            yield f"{METRICS}: the epochs of {stage} are not numbered 1, 2, 3, …"
    # The epochs of a derived run's training are in the run that it was derived from.
    own_stages = {"finetune", *run.summary.get("seconds", ())}
    for training, key in (("train", "train.epochs"), ("baseline", "train.epochs"), ("finetune", "finetune.epochs")):
        expected, count, stage = run.setting(key), counts.get(training, 0), STAGES[training_position(training)[0]]
        is_own = count or (stage in own_stages and (training != "baseline" or run.setting("baseline")))
        if is_own and stage in run.done and isinstance(expected, int) and count < expected:
            yield f"{METRICS}: {count} of {expected} epochs of {training}"
    if len(run.gates) and "train" in run.done and counts.get("train") and len(run.gates) != counts["train"]:
        yield f"gates.npz: {len(run.gates)} epochs, {METRICS} has {counts['train']} of train"
