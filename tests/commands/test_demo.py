import asyncio
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
from base64 import b64decode, b64encode
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers.browser import chromium
from helpers.small_run import small_run
from PIL import Image
from rich.console import Console

pytest.importorskip("uvicorn", reason="the demo needs its extra: pip install -e '.[dev]'")

import uvicorn
from starlette.testclient import TestClient

from prunekit.commands import demo as module
from prunekit.commands import demo_server
from prunekit.commands.demo import ComparedModel, Demo, demo
from prunekit.commands.demo_server import make_app
from prunekit.commands.predict import overlay
from prunekit.config.recipe import load
from prunekit.data.images import encode_png
from prunekit.errors import PrunekitError, RecipeError
from prunekit.pipeline.models import build_dense, load_model, save_model
from prunekit.runs.run_dir import RunDir
from prunekit.utils.progress import Reporter
from prunekit.utils.signals import sigterm_as_interrupt

QUIET = Reporter(Console(quiet=True))


def picture(height=40, width=60):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """An untrained run of maps: baseline, dense, slim, and one image in its gallery."""
    recipe = load("csnet", ["backbone.options.width=10", "backbone.options.blocks=[1, 1, 1, 1]", "data.size=32"])
    folder = tmp_path_factory.mktemp("demo") / "a <i>run"
    with RunDir.start(folder, recipe.dump(), {}) as run:
        for seed, name in enumerate(("baseline", "dense", "slim")):
            model = build_dense(recipe)
            torch.manual_seed(seed)
            with torch.no_grad():
                for _ in range(3):
                    model(torch.randn(2, 3, 32, 32))
            save_model(run, name, model)
        run.write_bytes("gallery/0003-image.png", encode_png(picture()))
    return folder


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("demo") / "labels")


def app_of(folder):
    shown = Demo(RunDir.open(folder), None, QUIET)
    samples = shown.samples()
    return make_app(shown.page(len(samples), demo_server.MAX_BYTES), shown.predict, samples)


def client(app):
    return TestClient(app, base_url="http://127.0.0.1:7860", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def maps_app(maps):
    return app_of(maps)


def pixels(url):
    return np.array(Image.open(io.BytesIO(b64decode(url.removeprefix("data:image/png;base64,")))))


def predicted(folder, name, image):
    """The map, or the probabilities, as ``prunekit predict`` has them."""
    run = RunDir.open(folder)
    recipe, task, classes = module.read_recipe(run), *module.read_task(run, module.read_recipe(run))
    return task, classes, task.predict(load_model(run, name), image, recipe.data.size)


def test_maps_are_those_of_predict(maps, maps_app):
    image = picture()
    answer = client(maps_app).post("/predict", content=encode_png(image)).json()
    assert np.array_equal(pixels(answer["picture"]), image) and (answer["width"], answer["height"]) == (60, 40)
    shown = [pixels(model["map"]).astype(int) for model in answer["models"]]
    assert len(shown) == 2 and abs(shown[0] - shown[1]).max() > 5
    for name, levels in zip(("dense", "slim"), shown, strict=True):
        assert abs(levels - predicted(maps, name, image)[2]).max() <= 1
    assert all(model["ms"] > 0 for model in answer["models"])


def test_large_pictures_are_shown_smaller(maps_app):
    answer = client(maps_app).post("/predict", content=encode_png(picture(300, 1200))).json()
    assert (answer["width"], answer["height"]) == (800, 200)
    assert {pixels(model["map"]).shape for model in answer["models"]} == {(200, 800)}


def test_classes_are_the_five_most_probable(labels):
    image = picture(16, 16)
    answer = client(app_of(labels)).post("/predict", content=encode_png(image)).json()
    assert len(answer["models"]) == 2
    for name, model in zip(("dense", "slim"), answer["models"], strict=True):
        _, classes, scores = predicted(labels, name, image)
        best = sorted(range(10), key=lambda label: -scores[label])[:5]
        assert [one["name"] for one in model["classes"]] == [classes[label] for label in best]
        assert [one["probability"] for one in model["classes"]] == pytest.approx(scores[best], abs=1e-4)


@pytest.mark.parametrize(
    ("has", "model", "compared"),
    [
        (["baseline", "dense", "slim", "finetuned"], None, ["dense", "finetuned"]),
        (["dense", "slim", "finetuned"], "slim", ["dense", "slim"]),
        (["baseline", "slim"], None, ["baseline", "slim"]),
        (["baseline", "dense"], "baseline", ["dense", "baseline"]),
        (["slim"], None, ["slim"]),
        (["dense"], None, ["dense"]),
    ],
)
def test_the_dense_model_is_compared_with_the_newest(labels, monkeypatch, has, model, compared):
    for place in ("prunekit.commands.demo", "prunekit.pipeline.models"):
        monkeypatch.setattr(f"{place}.trained_models", lambda _: has)
    monkeypatch.setattr(module, "_prepare", lambda run, name, recipe: name)
    assert Demo(RunDir.open(labels), model, QUIET).models == compared


def test_the_page_has_the_figures_of_both_models(labels):
    page = client(app_of(labels)).get("/").text
    facts = json.loads(re.search(r'id="facts">(.*?)</script>', page)[1])
    counts = RunDir.open(labels).read_json("summary.json")
    assert [model["form"] for model in facts["models"]] == ["deployed", "deployed"]
    for model in facts["models"]:
        expected = counts[model["name"]]
        assert (model["params"], model["macs"]) == (expected["params"], expected["macs"])


def test_the_page_escapes_names_and_loads_nothing_else(maps, maps_app):
    page = client(maps_app).get("/").text
    assert maps.name not in page and "a &lt;i&gt;run" in page
    assert re.findall(r"https?://|@import|<link(?! rel=\"icon\" href=\"data:,\")", page) == []


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "this file is empty (0 bytes); choose another picture"),
        (b"no picture", "this file is not an image that can be read; choose another picture"),
        (encode_png(picture())[:200], "choose another picture"),
    ],
)
def test_what_is_no_image_gives_a_readable_reason(maps_app, data, reason):
    response = client(maps_app).post("/predict", content=data)
    error = response.json()["error"]
    assert response.status_code == 422 and reason in error and "\n" not in error and "0x" not in error


def test_large_uploads_are_refused(monkeypatch):
    monkeypatch.setattr(demo_server, "MAX_BYTES", 10**6)
    got = []
    server = client(make_app("", lambda data: got.append(data) or {}))
    assert server.post("/predict", content=bytes(10**6)).status_code == 200
    response = server.post("/predict", content=bytes(10**6 + 1))
    assert response.status_code == 413 and "more than 1 MB; choose a smaller" in response.json()["error"]
    assert len(got) == 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "192.168.0.9:7860"}, 200),
        ({"host": "MyMachine:7860"}, 200),
        ({"host": "evil.example:7860"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "evil@[::1"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_other_sites_and_other_names_of_this_machine_are_refused(headers, status):
    calls = []
    server = client(make_app("PAGE", lambda data: calls.append(data) or {}, names=["mymachine"]))
    assert server.post("/predict", content=b"x", headers=headers).status_code == status
    assert bool(calls) == (status == 200)
    response = server.get("/", headers=headers)
    assert response.status_code == status and ("PAGE" in response.text) == (status == 200)
    assert response.headers["content-security-policy"] == "frame-ancestors 'none'"


def test_a_closed_page_is_no_error_of_the_server():
    messages = [{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    async def send(message):
        pass

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [(b"host", b"localhost")]}
    asyncio.run(make_app("", lambda data: {})(scope, receive, send))
    assert messages == []


def test_only_the_page_and_the_samples_are_served():
    server = client(make_app("PAGE", lambda data: {}, [b"png"]))
    assert server.get("/samples/0").content == b"png"
    for path in ("/samples/1", "/samples/-1", "/samples/..%2f..%2fetc%2fpasswd", "/../etc/passwd", "/demo.html"):
        assert server.get(path).status_code == 404, path
    assert server.get("/predict").status_code == 405


def test_samples_are_intact_images_of_the_gallery(maps, tmp_path):
    shown = Demo.__new__(Demo)
    shown.run = RunDir.open(maps)
    assert [np.array(Image.open(io.BytesIO(one))).shape for one in shown.samples()] == [(40, 60, 3)]
    path = maps / "gallery" / "0003-image.png"
    before = path.read_bytes()
    path.write_bytes(b"damaged")
    assert shown.samples() == []
    path.write_bytes(before)


def test_the_models_are_applied_to_one_picture_at_a_time():
    running, most = [], []

    def predict(data):
        running.append(data)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return {}

    app = make_app("", predict)
    threads = [threading.Thread(target=lambda: client(app).post("/predict", content=b"x")) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5


def test_a_port_in_use(maps, monkeypatch):
    monkeypatch.setattr(module, "_prepare", None)  # reported before any model is prepared
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PrunekitError, match=rf"^port {port} is in use; choose another with --port, or --port 0"):
            demo(maps, QUIET.console, port=port, browser=False)


def test_a_host_that_cannot_be_used(maps):
    with pytest.raises(PrunekitError, match=r"^--host 192\.0\.2\.1 --port 0: .*; choose others$"):
        demo(maps, QUIET.console, host="192.0.2.1", port=0, browser=False)


def test_a_model_that_the_run_does_not_have(maps):
    with pytest.raises(RecipeError, match="has no such model, did you mean 'slim'"):
        demo(maps, QUIET.console, model="slin", port=0, browser=False)


def test_the_extra_is_named_where_it_is_missing(maps, monkeypatch):
    monkeypatch.delitem(sys.modules, "prunekit.commands.demo_server")
    monkeypatch.delattr("prunekit.commands.demo_server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(PrunekitError, match=r'needs a package .*uvicorn.*; pip install "prunekit\[demo\]"$'):
        demo(maps, QUIET.console, port=0, browser=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_without_an_error(maps, monkeypatch, number):
    seen, out = [], io.StringIO()

    def use(url):
        try:
            seen.append(urllib.request.urlopen(url, timeout=60).read())
        finally:
            os.kill(os.getpid(), number)

    def open_browser(url):
        threading.Thread(target=use, args=[url]).start()

    monkeypatch.setattr("webbrowser.open", open_browser)
    monkeypatch.setattr(
        module, "_prepare", lambda run, name, recipe: ComparedModel(name, torch.nn.Identity(), "", 1, 1)
    )
    with sigterm_as_interrupt():
        demo(maps, Console(file=out, width=200), port=0)
    assert b"prunekit demo" in seen[0]
    assert re.search(r"http://127\.0\.0\.1:\d+ shows dense and slim of .*; Ctrl-C ends it", out.getvalue())


# ---- in a browser


@contextmanager
def served(app):
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as chrome:
        chrome.set_script_timeout(20)
        yield chrome


# Wait until the page has answered and says something that contains a text; return the class of its message.
WAIT = """
const [text, done] = arguments, line = document.querySelector("#message"), main = document.querySelector("main");
const look = () => {
  if (main.ariaBusy === "false" && line.textContent.includes(text)) done(line.className);
  else setTimeout(look, 20);
};
look();
"""
DROP = """
const [data, name] = arguments, transfer = new DataTransfer();
transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name));
document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
"""


def texts(driver, selector):
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText.trim())", selector
    )


def test_a_chosen_picture_shows_both_maps_and_the_figures(driver, maps_app, tmp_path):
    image = picture(200, 300)
    Image.fromarray(image).save(tmp_path / "mine.png")
    expected = client(maps_app).post("/predict", content=encode_png(image)).json()
    with served(maps_app) as url:
        driver.get_log("performance")
        driver.get(url)
        assert len(texts(driver, "#figures tr")) == 2 and texts(driver, "figure") == []
        driver.find_element("id", "file").send_keys(str(tmp_path / "mine.png"))
        assert driver.execute_async_script(WAIT, "mine.png") == ""
        assert [caption.split()[0] for caption in texts(driver, "figcaption")] == ["picture", "dense", "slim"]
        shown = driver.execute_script("return [...document.querySelectorAll('img.map')].map((e) => e.src)")
        assert shown == [model["map"] for model in expected["models"]]
        for row, name in zip(texts(driver, "#figures tr"), ("dense", "slim"), strict=True):
            assert re.match(rf"{name}\s+deployed\s+[\d,]+\s", row) and re.search(r"[\d.]+ ms", row)
        driver.find_element("css selector", "[value=overlay]").click()
        frame = driver.find_elements("css selector", ".model .frame")[1]
        seen = np.array(Image.open(io.BytesIO(frame.screenshot_as_png)).convert("RGB").resize((30, 20), 4)).astype(int)
        tinted = overlay(image, pixels(expected["models"][1]["map"]))
        reduced = np.array(Image.fromarray(tinted).resize((30, 20), 4)).astype(int)
        assert abs(seen - reduced).mean() < 4
        driver.execute_script(DROP, "bm8gcGljdHVyZQ==", "notes.txt")
        assert driver.execute_async_script(WAIT, "not an image") == "bad"
        assert len(texts(driver, "figure")) == 3  # what was there stays
        driver.find_element("css selector", "#samples button").click()
        assert driver.execute_async_script(WAIT, "sample 1") == ""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # Of this page: the browser asks for pages of its own, too.
    asked = {one["request"]["url"] for one in requests if one["documentURL"].startswith(url)}
    assert asked and [address for address in asked if not address.startswith((url, "data:"))] == []


def test_dropped_pictures_show_classes_on_a_telephone(driver, labels):
    with served(app_of(labels)) as url:
        metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get_log("browser")
        driver.get(url)
        driver.execute_script(DROP, b64encode(encode_png(picture(16, 16))).decode(), "digit.png")
        assert driver.execute_async_script(WAIT, "digit.png") == ""
        assert len(texts(driver, "li")) == 10
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        assert driver.get_log("browser") == []
