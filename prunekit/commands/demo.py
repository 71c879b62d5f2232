"""``prunekit demo``: a page on this machine that applies a run's models to pictures, side by side.

The server is in :mod:`prunekit.commands.demo_server`, the page in ``assets/demo.html``. Nothing is written anywhere.
"""

from __future__ import annotations

import base64
import errno
import secrets
import socket
import webbrowser
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from PIL import Image
from rich.console import Console
from torch import nn

from prunekit.commands.predict import OPACITY, TINT
from prunekit.config.schema import Recipe
from prunekit.data.datasets import image_tensor, normalize, resize
from prunekit.data.images import decode_image, encode_png
from prunekit.deployment.deploy import deploy, time_interleaved
from prunekit.deployment.export.subnormals import without_subnormals
from prunekit.errors import DataError, PrunekitError
from prunekit.flops import count
from prunekit.pipeline.models import (
    choose_model,
    input_shape,
    load_model,
    read_recipe,
    read_task,
    trained_models,
)
from prunekit.runs.run_dir import RunDir
from prunekit.utils.environment import processor_name
from prunekit.utils.io import os_error_reason
from prunekit.utils.progress import Reporter

ROUNDS, CALLS = 3, 2  # for each picture; a round of time_interleaved times two calls
SHOWN_SIDE = 800  # pixels at most of what the page shows
SAMPLES, TOP = 4, 5


@dataclass(frozen=True)
class ComparedModel:
    """A model of the run, ready to be applied."""

    name: str
    network: nn.Module
    form: str  # "deployed", or "eager" where it cannot be deployed
    params: int
    macs: int


class Demo:
    """The models of a run that are compared: its dense one (else its baseline), and the chosen or newest one."""

    def __init__(self, run: RunDir, model: str | None, reporter: Reporter):
        self.run, self.recipe = run, read_recipe(run)
        self.task, self.classes = read_task(run, self.recipe)
        if not (self.task.predicts_images or self.classes):
            raise DataError(f"prunekit demo shows maps and classes; task: {self.recipe.task} predicts neither")
        chosen = choose_model(run, model)
        reference = [name for name in ("dense", "baseline") if name in trained_models(run)][:1]
        self.models: list[ComparedModel] = []
        for name in dict.fromkeys([*reference, chosen]):
            with reporter.spinner(f"preparing {name}"):
                self.models.append(_prepare(run, name, self.recipe))

    def samples(self) -> list[bytes]:
        """Return some validation images that the run has kept, as PNG; damaged ones are left out."""
        found = []
        for path in sorted((self.run.path / "gallery").glob("*-image.png"))[:SAMPLES]:
            with suppress(PrunekitError):
                found.append(self.run.read_bytes(f"gallery/{path.name}"))
        return found

    def page(self, samples: int, max_bytes: int) -> str:
        """Return the page, with ``samples`` pictures to choose from."""
        facts = {
            "maps": self.task.predicts_images,
            "models": [{k: v for k, v in vars(model).items() if k != "network"} for model in self.models],
            "samples": samples,
            "max_bytes": max_bytes,
        }
        environment = Environment(autoescape=True, trim_blocks=True)
        return environment.from_string((files("prunekit.commands") / "assets" / "demo.html").read_text("utf-8")).render(
            facts=facts,
            run=self.run.path.resolve().name,
            recipe=self.recipe,
            processor=processor_name(),
            threads=torch.get_num_threads(),
            calls=ROUNDS * CALLS,
            tint=TINT.tolist(),
            opacity=OPACITY,
            nonce=secrets.token_urlsafe(),
        )

    def predict(self, data: bytes) -> dict[str, Any]:
        """Apply the models to an image file.

        Returns:
            the picture as the models see it, and for each model the median time of its network in milliseconds and a
            map or the most probable classes. Pictures and maps are data URLs, at most 800 pixels wide and high.

        Raises:
            DataError: it is not an image.
            TrainingError: an output is not finite.
        """
        try:
            image = decode_image(data, "this file")
        except DataError as error:
            # The fix in its message is for data sets.
            raise DataError(f"{str(error).rpartition(';')[0]}; choose another picture") from error
        size = self.recipe.data.size
        predictions = [self.task.predict(model.network, image, size) for model in self.models]
        example = normalize(resize(image_tensor(image), (size, size)))
        times = time_interleaved([partial(model.network, example) for model in self.models], ROUNDS)
        shown = _shrink(image)
        return {
            "picture": _data_url(shown),
            "width": shown.shape[1],
            "height": shown.shape[0],
            "models": [{"ms": ms, **self._result(one)} for ms, one in zip(times, predictions, strict=True)],
        }

    def _result(self, prediction: np.ndarray) -> dict[str, Any]:
        rendered = self.task.render(prediction, self.classes)
        if isinstance(rendered, np.ndarray):
            return {"map": _data_url(_shrink(rendered))}
        best = np.argsort(-prediction, kind="stable")[:TOP]
        return {"classes": [{"name": self.classes[i], "probability": float(prediction[i])} for i in best]}


def _prepare(run: RunDir, name: str, recipe: Recipe) -> ComparedModel:
    model = without_subnormals(load_model(run, name, recipe)).requires_grad_(False)
    example = torch.randn(1, *input_shape(recipe), generator=torch.Generator().manual_seed(0))
    network, record = deploy(model, example)
    cost = count(model, example)
    return ComparedModel(name, network, "eager" if record.fallback_reason else "deployed", cost.params, cost.macs)


def _shrink(pixels: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(pixels)
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return np.array(picture)


def _data_url(pixels: np.ndarray) -> str:
    return f"data:image/png;base64,{base64.b64encode(encode_png(pixels)).decode()}"


def demo(
    folder: Path,
    console: Console,
    *,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    browser: bool = True,
) -> None:
    """Show the page until Ctrl-C.

    Args:
        model: "baseline", "dense", "slim" or "finetuned", to compare with the dense model; None for the run's newest.
        host: the address to listen on.
        port: 0 for a free one.
        browser: open the page in the browser.

    Raises:
        PrunekitError: the extra ``demo`` is not installed, the port or the address cannot be used, or the run folder
            cannot.
    """
    try:
        from prunekit.commands.demo_server import MAX_BYTES, make_app, run_server
    except ImportError as error:
        raise PrunekitError(
            f'prunekit demo needs a package that cannot be imported ({error}); pip install "prunekit[demo]"'
        ) from error
    run = RunDir.open(folder)
    # Before the models are prepared, which takes seconds.
    with _listen(host, port) as listener:
        shown = Demo(run, model, Reporter(console))
        samples = shown.samples()
        app = make_app(shown.page(len(samples), MAX_BYTES), shown.predict, samples, names=(host, socket.gethostname()))
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listener.getsockname()[1]}"
        names = " and ".join(one.name for one in shown.models)
        with suppress(KeyboardInterrupt):  # the usual way to end it
            Reporter(console).info(f"{url} shows {names} of {folder}; Ctrl-C ends it")
            if browser:
                webbrowser.open(url)
            run_server(app, listener)


def _listen(host: str, port: int) -> socket.socket:
    """Bind and listen; PrunekitError if that is not possible."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PrunekitError(
                f"port {port} is in use; choose another with --port, or --port 0 for a free one"
            ) from error
        raise PrunekitError(f"--host {host} --port {port}: {os_error_reason(error)}; choose others") from error
