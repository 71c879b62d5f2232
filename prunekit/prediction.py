"""Maps for images of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from prunekit import registry
from prunekit.data.images import is_image, read_image, write_map
from prunekit.errors import DataError
from prunekit.loading import MODELS, load_model, newest_model, read_recipe
from prunekit.progress import Reporter
from prunekit.rundir import RunDir


def predict(
    folder: Path, images: Sequence[Path], out: Path, model: str | None = None, console: Console | None = None
) -> list[Path]:
    """Write the map of each image, at the image's own size, as ``out/STEM.png``.

    Args:
        folder: a run folder.
        images: image files, and folders whose images are taken.
        out: made where it is not there.
        model: "dense", "slim" or "finetuned"; None for the last that the run has.

    Returns:
        the files written.

    Raises:
        DataError: no image, two of one name, or (after all others are done) images that cannot be read.
        PrunekitError: the run folder cannot be used.
    """
    run = RunDir.open(folder)
    if model is not None and model not in MODELS:
        raise DataError(f"--model {model}: there are {', '.join(MODELS)}")
    name = model or newest_model(run)
    sources = _sources(images)
    recipe = read_recipe(run)
    network = load_model(run, name, recipe)
    task = registry.tasks.get(recipe.task)()
    reporter = Reporter(console or Console())
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {out}: {error.strerror}; choose another --out DIR") from error
    written, broken = [], []
    counter = reporter.counter("predict")
    try:
        for done, (stem, source) in enumerate(sources.items(), start=1):
            try:
                image = read_image(source)
            except DataError as error:
                broken.append(str(error))
            else:
                target = out / f"{stem}.png"
                write_map(target, task.predict(network, image, recipe.data.size))
                written.append(target)
            counter(done, len(sources))
    finally:
        counter.close()
    reporter.say(f"{len(written)} maps of the {name} model in {out}")
    if broken:
        raise DataError("\n".join(broken))
    return written


def _sources(images: Sequence[Path]) -> dict[str, Path]:
    """Stem of the map → image."""
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
    named: dict[str, Path] = {}
    for path in files:
        if path.stem in named and named[path.stem] != path:
            raise DataError(f"{named[path.stem]} and {path} would both become {path.stem}.png; give them in two calls")
        named[path.stem] = path
    return named
