"""``prunekit predict``: apply a run's model to images."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from prunekit.data.images import is_image, read_image, write_map
from prunekit.errors import DataError
from prunekit.pipeline.models import MODELS, load_model, newest_model, read_recipe, read_task
from prunekit.runs.run_dir import RunDir
from prunekit.utils.io import write_atomic
from prunekit.utils.progress import Reporter
from prunekit.utils.text import did_you_mean, plural

TABLE = "predictions.csv"


def predict(
    folder: Path, images: Sequence[Path], out: Path, model: str | None = None, console: Console | None = None
) -> list[Path]:
    """Apply a model to images.

    Saliency writes a map for each image, of the image's size, as ``out/STEM.png``. Classification writes
    ``out/predictions.csv`` with the columns file, class and probability.

    Args:
        images: image files, and folders of images.
        model: "baseline", "dense", "slim" or "finetuned"; None for the run's newest.

    Returns:
        the files written.

    Raises:
        DataError: there are no images, two maps would have the same name, or images cannot be read. The last is raised
            after the other images are done.
        PrunekitError: the run folder cannot be used.
    """
    run = RunDir.open(folder)
    if model is not None and model not in MODELS:
        raise DataError(f"--model {model}: choose one of {', '.join(MODELS)}")
    name = model or newest_model(run)
    recipe = read_recipe(run)
    task, classes = read_task(run, recipe)
    sources = _list_images(images)
    if task.predicts_images:
        _check_stems(sources)
    network = load_model(run, name, recipe)
    reporter = Reporter(console or Console())
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create the folder {out}: {error.strerror}; choose another --out DIR") from error
    written, rows, errors = [], [], []
    with closing(reporter.progress_bar("predict")) as progress:
        for done, source in enumerate(sources, start=1):
            try:
                image = read_image(source)
            except DataError as error:
                errors.append(str(error))
            else:
                result = task.render(task.predict(network, image, recipe.data.size), classes)
                if task.predicts_images:
                    written.append(out / f"{source.stem}.png")
                    write_map(written[-1], result)
                else:
                    rows.append({"file": str(source), **result})
            progress(done, len(sources))
    if rows:
        write_atomic(out / TABLE, _to_csv(rows))
        written.append(out / TABLE)
        reporter.info(f"{name} model: predictions of {plural(len(rows), 'image')} saved to {out / TABLE}")
    elif task.predicts_images:
        reporter.info(f"{name} model: {plural(len(written), 'map')} saved to {out}")
    if errors:
        raise DataError("\n".join(errors))
    return written


def _list_images(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            images = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".") and is_image(p))
            if not images:
                raise DataError(f"no images in {path}; give a folder of images")
            files += images
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"{path} does not exist{did_you_mean(path)}; give an image or a folder of images")
    return list(dict.fromkeys(files))


def _check_stems(files: Sequence[Path]) -> None:
    by_stem: dict[str, Path] = {}
    for path in files:
        if path.stem in by_stem:
            raise DataError(
                f"{by_stem[path.stem]} and {path} would both become {path.stem}.png; run prunekit predict for each"
            )
        by_stem[path.stem] = path


def _to_csv(rows: Sequence[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
