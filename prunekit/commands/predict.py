"""What a run's model says of images of the user's own."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from prunekit.data.images import is_image, read_image, write_map
from prunekit.errors import DataError
from prunekit.pipeline.models import MODELS, load_model, newest_model, read_recipe, read_task
from prunekit.runs.run_dir import RunDir
from prunekit.utils.io import write_atomic
from prunekit.utils.progress import Reporter

TABLE = "predictions.csv"


def predict(
    folder: Path, images: Sequence[Path], out: Path, model: str | None = None, console: Console | None = None
) -> list[Path]:
    """Apply a model to images: saliency writes the map of each, at the image's own size, as ``out/STEM.png``;
    classification writes ``out/predictions.csv``, a row for each image: file, class, probability.

    Args:
        folder: a run folder.
        images: image files, and folders whose images are taken.
        out: made where it is not there.
        model: "baseline", "dense", "slim" or "finetuned"; None for the last that the run has.

    Returns:
        the files written.

    Raises:
        DataError: no image, two that would become one map, or (after all others are done) images that cannot be read.
        PrunekitError: the run folder cannot be used.
    """
    run = RunDir.open(folder)
    if model is not None and model not in MODELS:
        raise DataError(f"--model {model}: there are {', '.join(MODELS)}")
    name = model or newest_model(run)
    recipe = read_recipe(run)
    task, classes = read_task(run, recipe)
    sources = _sources(images)
    stems = _stems(sources) if task.pictures else {}
    network = load_model(run, name, recipe)
    reporter = Reporter(console or Console())
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {out}: {error.strerror}; choose another --out DIR") from error
    written, rows, broken = [], [], []
    counter = reporter.progress_bar("predict")
    try:
        for done, source in enumerate(sources, start=1):
            try:
                image = read_image(source)
            except DataError as error:
                broken.append(str(error))
            else:
                shown = task.show(task.predict(network, image, recipe.data.size), classes)
                if task.pictures:
                    written.append(out / f"{stems[source]}.png")
                    write_map(written[-1], shown)
                else:
                    rows.append({"file": str(source), **shown})
            counter(done, len(sources))
    finally:
        counter.close()
    if rows:
        write_atomic(out / TABLE, _csv(rows))
        written.append(out / TABLE)
        reporter.info(f"{len(rows)} images, by the {name} model, in {out / TABLE}")
    elif task.pictures:
        reporter.info(f"{len(written)} maps of the {name} model in {out}")
    if broken:
        raise DataError("\n".join(broken))
    return written


def _sources(images: Sequence[Path]) -> list[Path]:
    """The image files, each once."""
    files: list[Path] = []
    for path in images:
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".") and is_image(p))
            if not found:
                raise DataError(f"no image in {path}; give a folder that holds some")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"{path} is not there; give an image or a folder of images")
    return list(dict.fromkeys(files))


def _stems(files: Sequence[Path]) -> dict[Path, str]:
    """Image → stem of its map."""
    named: dict[str, Path] = {}
    for path in files:
        if path.stem in named:
            raise DataError(f"{named[path.stem]} and {path} would both become {path.stem}.png; give them in two calls")
        named[path.stem] = path
    return {path: stem for stem, path in named.items()}


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()
