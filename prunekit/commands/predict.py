"""``prunekit predict``: apply a run's model to images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from prunekit.data.images import is_image, read_image, write_image
from prunekit.errors import DataError
from prunekit.pipeline.models import choose_model, load_model, read_recipe, read_task
from prunekit.runs.run_dir import RunDir
from prunekit.utils.io import write_atomic
from prunekit.utils.progress import Reporter
from prunekit.utils.text import did_you_mean, plural

TABLE = "predictions.csv"
TINT, OPACITY = np.array([213, 94, 0]), 0.6  # of an overlay, where the map is 255


def overlay(image: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return an image, uint8 [H, W, 3], tinted by a map, uint8 [H, W]."""
    weight = levels[..., None] / 255 * OPACITY
    return np.rint(image * (1 - weight) + TINT * weight).astype(np.uint8)


def cutout(image: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return an image, uint8 [H, W, 3], with a map, uint8 [H, W], as its transparency: uint8 [H, W, 4]."""
    return np.dstack([image, levels])


PICTURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"overlay": overlay, "cutout": cutout}


def predict(
    folder: Path,
    images: Sequence[Path],
    out: Path,
    model: str | None = None,
    console: Console | None = None,
    *,
    overwrite: bool = False,
    pictures: Sequence[str] = (),
) -> list[Path]:
    """Apply a model to images, and return the files written.

    Saliency writes a map for each image, of the image's size, as ``out/STEM.png``. Classification writes
    ``out/predictions.csv`` with the columns file, class and probability. An image is never overwritten.

    Args:
        images: image files, and folders of images.
        model: "baseline", "dense", "slim" or "finetuned"; None for the run's newest.
        overwrite: replace maps or a table that exist.
        pictures: of ``PICTURES``, each written beside the map as ``out/STEM-NAME.png``.

    Raises:
        DataError: there are no images, a file would be overwritten, two files would have the same name, pictures of a
            task without maps, or images cannot be read. The last is raised after the other images are done.
        PrunekitError: the run folder cannot be used.
    """
    run = RunDir.open(folder)
    name = choose_model(run, model)
    recipe = read_recipe(run)
    task, classes = read_task(run, recipe)
    sources = _list_images(images)
    if pictures and not task.predicts_images:
        raise DataError(f"--{pictures[0]} needs a model that predicts maps; that of {folder} writes {TABLE}")
    targets = _targets(sources, out, pictures) if task.predicts_images else {}
    _check_targets([path for paths in targets.values() for path in paths] or [out / TABLE], sources, overwrite)
    network = load_model(run, name, recipe)
    reporter = Reporter(console or Console())
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create the folder {out}: {error.strerror}; choose another --out DIR") from error
    written: list[Path] = []
    rows: list[dict[str, object]] = []
    errors: list[str] = []
    start = time.perf_counter()
    with closing(reporter.progress_bar("predict")) as progress, ThreadPoolExecutor() as pool:
        writing: list[Future[None]] = []  # the last image's files: encoding takes about as long as the model
        for done, source in enumerate(sources, start=1):
            try:
                image = read_image(source)
            except DataError as error:
                errors.append(str(error))
            else:
                result = task.render(task.predict(network, image, recipe.data.size), classes)
                if isinstance(result, np.ndarray):
                    for file in writing:
                        file.result()
                    made = [result, *(PICTURES[name](image, result) for name in pictures)]
                    writing = [
                        pool.submit(write_image, path, pixels)
                        for path, pixels in zip(targets[source], made, strict=True)
                    ]
                    written += targets[source]
                else:
                    rows.append({"file": str(source), **result})
            progress(done, len(sources))
        for file in writing:
            file.result()
    done = len(sources) - len(errors)
    speed = f"{done / (time.perf_counter() - start):.3g} images/s"
    if rows:
        # A file name may be no valid UTF-8; the table is.
        csv_text = pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")
        write_atomic(out / TABLE, csv_text.encode(errors="backslashreplace"))
        written.append(out / TABLE)
        reporter.info(f"{name} model: predictions of {plural(done, 'image')} saved to {out / TABLE}, {speed}")
    elif task.predicts_images:
        also = "".join(f", and as {name}s" for name in pictures)
        reporter.info(f"{name} model: {plural(done, 'map')} saved to {out}{also}, {speed}")
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


def _targets(sources: Sequence[Path], out: Path, pictures: Iterable[str]) -> dict[Path, list[Path]]:
    """The files that each image becomes: its map, then the pictures."""
    endings = ["", *(f"-{name}" for name in pictures)]
    targets = {source: [out / f"{source.stem}{ending}.png" for ending in endings] for source in sources}
    owners: dict[Path, Path] = {}
    for source, path in ((source, path) for source, paths in targets.items() for path in paths):
        if (other := owners.setdefault(path, source)) is not source:
            raise DataError(f"{other} and {source} would both become {path.name}; run prunekit predict for each")
    return targets


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
