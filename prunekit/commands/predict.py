"""``prunekit predict``: apply a run's model to images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pandas as pd
from rich.console import Console

from prunekit.data.images import is_image, read_image, write_map
from prunekit.errors import DataError
from prunekit.pipeline.models import choose_model, load_model, read_recipe, read_task
from prunekit.runs.run_dir import RunDir
from prunekit.utils.io import write_atomic
from prunekit.utils.progress import Reporter
from prunekit.utils.text import did_you_mean, plural

TABLE = "predictions.csv"


def predict(
    folder: Path,
    images: Sequence[Path],
    out: Path,
    model: str | None = None,
    console: Console | None = None,
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Apply a model to images, and return the files written.

    Saliency writes a map for each image, of the image's size, as ``out/STEM.png``. Classification writes
    ``out/predictions.csv`` with the columns file, class and probability. An image is never overwritten.

    Args:
        images: image files, and folders of images.
        model: "baseline", "dense", "slim" or "finetuned"; None for the run's newest.
        overwrite: replace maps or a table that exist.

    Raises:
        DataError: there are no images, a file would be overwritten, two maps would have the same name, or images cannot
            be read. The last is raised after the other images are done.
        PrunekitError: the run folder cannot be used.
    """
    run = RunDir.open(folder)
    name = choose_model(run, model)
    recipe = read_recipe(run)
    task, classes = read_task(run, recipe)
    sources = _list_images(images)
    targets = _targets(sources, out) if task.predicts_images else [out / TABLE]
    _check_targets(targets, sources, overwrite)
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
                    written.append(targets[done - 1])
                    write_map(written[-1], result)
                else:
                    rows.append({"file": str(source), **result})
            progress(done, len(sources))
    if rows:
        # A file name may be no valid UTF-8; the table is.
        csv_text = pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")
        write_atomic(out / TABLE, csv_text.encode(errors="backslashreplace"))
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
            images = sorted(p for p in path.iterdir() if p.is_file() and is_image(p))
            if not images:
                raise DataError(f"no images in {path}; give a folder of images")
            files += images
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"{path} does not exist{did_you_mean(path)}; give an image or a folder of images")
    return list(dict.fromkeys(files))


def _targets(sources: Sequence[Path], out: Path) -> list[Path]:
    by_stem: dict[str, Path] = {}
    for path in sources:
        if (other := by_stem.setdefault(path.stem, path)) is not path:
            raise DataError(f"{other} and {path} would both become {path.stem}.png; run prunekit predict for each")
    return [out / f"{stem}.png" for stem in by_stem]


def _check_targets(targets: Sequence[Path], sources: Sequence[Path], overwrite: bool) -> None:
    # By file and not by path, since links and case-insensitive file systems give a file several paths.
    inputs = {_file_id(source): source for source in sources}
    existing = [target for target in targets if target.exists()]
    for target in existing:
        if source := inputs.get(_file_id(target)):
            raise DataError(f"{target} would overwrite the input {source}; choose another --out DIR")
    if existing and not overwrite:
        more = f" and {plural(len(existing) - 1, 'other file')}" if existing[1:] else ""
        raise DataError(f"{existing[0]}{more} would be overwritten; choose another --out DIR, or give --overwrite")


def _file_id(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
