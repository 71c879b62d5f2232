import contextlib
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import prunekit
from prunekit.cli import app, main
from prunekit.config import registry, yaml
from prunekit.config.recipe import load
from prunekit.errors import DataError, Interrupted, PrunekitWarning, RecipeError, RunError, TrainingError
from prunekit.utils.progress import Reporter


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out = capsys.readouterr()
        return stop.value.code, out.out, out.err

    return run


def one_line(error):
    return error.count("\n") == 1 and error.startswith("prunekit: ") and "Traceback" not in error


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def recipe(**lines):
    text = {
        "name": "test",
        "backbone": "{name: csnet, options: {width: 8, blocks: [1, 1, 1, 1]}}",
        "data": "{name: salient_shapes, size: 32, options: {train: 8, val: 4}}",
        "train": "{epochs: 1}",
        "finetune": "{epochs: 1}",
        **lines,
    }
    Path("mine.yaml").write_text("".join(f"{key}: {value}\n" for key, value in text.items()))
    return "mine.yaml"


def folder_with(images, masks):
    for name, files in (("images", images), ("GT", masks)):
        folder = Path("photos") / name
        folder.mkdir(parents=True)
        for file in files:
            Image.new("RGB", (20, 20)).save(folder / file)
    return "photos"


@pytest.mark.parametrize(
    "lines, words",
    [
        ({"train": "{epoch: 1, epochs: 2}"}, ["mine.yaml:4:", "train.epoch", "did you mean 'train.epochs'"]),
        ({"train": "{epochs: many}"}, ["mine.yaml:4:", "train.epochs", "'many' must be a valid integer"]),
        ({"backbone": "{name: csnett}"}, ["mine.yaml:2:", "unknown backbone 'csnett'", "csnet"]),
        ({"data": "{name: folder, root: nowhere}"}, ["nowhere"]),
    ],
)
def test_recipe_error_is_one_line_and_creates_no_run(call, lines, words):
    status, _, error = call("run", recipe(**lines))
    assert status == 2 and one_line(error)
    for word in words:
        assert word in error
    assert not Path("runs").exists()


def test_all_errors_of_a_recipe_are_reported_together(call):
    lines = {"train": "{epochs: -1, optimiser: adam}", "backbone": "{name: nothing}", "extra": "1", "data": "{name: 3}"}
    status, _, error = call("run", recipe(**lines))
    assert status == 2 and "Traceback" not in error
    for word in ("train.epochs", "train.optimiser", "unknown backbone", "extra", "data.name"):
        assert sum(word in line for line in error.splitlines()) == 1, word


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("gone.yaml", None, "no such file"),
        ("latin.yaml", "name: é".encode("latin-1"), "UTF-8"),
        ("broken.yaml", b"name: [1, 2", "broken.yaml:1:"),
        ("list.yaml", b"- 1\n- 2\n", "list.yaml:1:1: a recipe consists of"),
        ("binary.yaml", bytes(range(256)), "binary.yaml"),
        ("tag.yaml", b"name: !!python/object/apply:os.system [true]\n", "tag.yaml:1:"),
    ],
)
def test_files_that_are_not_recipes(call, name, content, word):
    if content is not None:
        Path(name).write_bytes(content)
    status, _, error = call("run", name)
    assert status == 2 and word in error and "Traceback" not in error and not Path("runs").exists()


def test_missing_pairs_and_unreadable_images(call):
    folder = folder_with([], [])
    data = f"{{name: folder, root: {folder}}}"
    status, _, error = call("run", recipe(data=data))
    assert status == 2 and one_line(error) and folder in error
    for name in ("images", "GT"):
        for i in range(12):
            Image.new("RGB", (20, 20)).save(Path(folder) / name / f"{i}.png")
    (Path(folder) / "images" / "7.png").write_bytes(b"not an image")
    status, _, error = call("run", recipe(data=data))
    assert status == 2 and one_line(error) and "7.png" in error and not Path("runs").exists()
    status, _, error = call("run", recipe(data="{name: folder}"))
    assert status == 2 and one_line(error) and "data.root" in error


def test_errors_in_overrides(call):
    status, _, error = call("run", recipe(), "train.epocs=3", "seed=x")
    assert status == 2 and "train.epocs" in error and "epochs" in error and "seed" in error
    status, _, error = call("run", recipe(), "nonsense")
    assert status == 2 and "nonsense" in error


def test_stage_names_and_conflicting_options(call):
    status, _, error = call("run", recipe(), "--from", "slimm")
    assert status == 2 and "did you mean 'slim'" in error
    status, _, error = call("run", recipe(), "--from", "slim")
    assert status == 2 and one_line(error)
    status, _, error = call("run", recipe(), "--resume", "--overwrite")
    assert status == 2 and "exclude each other" in error


def test_folders_that_are_not_runs(call, monkeypatch):
    Path("photos").mkdir()
    for arguments in (("report", "photos"), ("report", "gone"), ("predict", "gone", "photos", "--out", "maps")):
        status, _, error = call(*arguments)
        assert status == 2 and one_line(error) and "not a run folder" in error, arguments
    Path("runs").mkdir()
    Path("runs/test").write_text("a file")
    with monkeypatch.context() as patch:
        patch.setattr("prunekit.pipeline.runner.check_recipe", None)  # reported before anything is tried
        status, _, error = call("run", recipe())
    assert status == 2 and one_line(error) and "runs/test" in error


def test_mistyped_command(call):
    status, _, error = call("rum")
    assert status == 2 and "Traceback" not in error


def test_debug_prints_the_traceback(call):
    status, _, error = call("run", "gone.yaml", "--debug")
    assert status == 2 and "Traceback" in error


def test_unexpected_error_is_one_line(call, monkeypatch):
    import prunekit.config.recipe

    def broken(*_):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(prunekit.config.recipe, "load", broken)
    status, _, error = call("run", "x.yaml")
    assert status == 3 and one_line(error) and "--debug" in error


def test_interrupted(call, monkeypatch):
    import prunekit.config.recipe

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prunekit.config.recipe, "load", interrupt)
    status, _, error = call("run", "x.yaml")
    assert status == 130 and error == "prunekit: interrupted\n"


# Each command with its shortest arguments, and the function that does its work.
COMMANDS = {
    "run": (["csnet"], "prunekit.pipeline.runner.run_recipe"),
    "sweep": (["csnet", "seed=0,1"], "prunekit.commands.sweep.run_sweep"),
    "slim": (["RUN"], "prunekit.pipeline.runner.slim_run"),
    "finetune": (["RUN"], "prunekit.pipeline.runner.finetune_run"),
    "report": (["RUN"], "prunekit.reporting.report"),
    "watch": (["RUN"], "prunekit.commands.watch.watch"),
    "eval": (["RUN", "--data", "a=b"], "prunekit.commands.evaluate.evaluate"),
    "predict": (["RUN", "photos", "--out", "maps"], "prunekit.commands.predict.predict"),
    "demo": (["RUN"], "prunekit.commands.demo.demo"),
    "export": (["RUN", "--format", "onnx"], "prunekit.pipeline.export.export_run"),
    "bench": (["RUN"], "prunekit.commands.bench.bench_run"),
    "import": (["csnet", "file", "--out", "DIR"], "prunekit.commands.import_model.import_run"),
    "profile": (["csnet"], "prunekit.commands.profile.profile_recipe"),
    "groups": (["csnet", "--json"], "prunekit.commands.groups.inspect_groups"),
    "list": ([], "prunekit.commands.list.table"),
    "validate": (["csnet"], "prunekit.config.recipe.load"),
    "cp": (["csnet", "new.yaml"], "prunekit.commands.copy_recipe.copy_recipe"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_exit_statuses(call, monkeypatch, command):
    arguments, work = COMMANDS[command]
    monkeypatch.setattr("prunekit.commands.import_model.derived_recipe", lambda *_: None)
    monkeypatch.setattr("prunekit.commands.groups.dump", lambda _: "")
    monkeypatch.setattr(work, lambda *_, **__: "")
    assert call(command, *arguments)[0] == 0
    for error, status, words in (
        (RecipeError("wrong"), 2, "wrong"),
        (DataError("wrong"), 2, "wrong"),
        (TrainingError("diverged"), 3, "diverged"),
        (RunError("memory"), 3, "memory"),
        (RuntimeError("a library"), 3, "unexpected RuntimeError: a library"),
        (OSError("the system"), 3, "the system"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted(), 130, "interrupted"),
    ):

        def raises(*_, error=error, **__):
            raise error

        monkeypatch.setattr(work, raises)
        code, _, message = call(command, *arguments)
        assert (code, one_line(message), words in message) == (status, True, True), message


def test_exit_statuses_cover_every_command():
    assert set(COMMANDS) == {c.name or c.callback.__name__ for c in app.registered_commands}


@pytest.mark.parametrize(
    "command, arguments, resume",
    [
        ("run", ["csnet", "name=two words"], "run csnet 'name=two words' --out 'runs/two words' --resume"),
        ("run", ["csnet", "--out", "x", "--from", "slim"], "run csnet --out x --resume"),
        ("run", ["csnet", "--out", "x", "--until", "slim"], "run csnet --out x --until slim --resume"),
        ("sweep", ["csnet", "seed=0,1"], "sweep csnet seed=0,1 --out runs/csnet-sweep --resume"),
        (
            "sweep",
            ["csnet", "seed=0,1", "--trials", "2", "--engine", "ray", "--out", "x"],
            "sweep csnet seed=0,1 --trials 2 --engine ray --out x --resume",
        ),
        ("slim", ["RUN", "slim.threshold=1"], "slim RUN slim.threshold=1 --out RUN-slim --overwrite"),
        ("finetune", ["RUN", "--out", "x"], "run x/recipe.yaml --out x --resume"),
    ],
)
def test_interrupt_suggests_how_to_resume(call, monkeypatch, command, arguments, resume):
    def stopped(*_, **__):
        raise Interrupted

    monkeypatch.setattr("prunekit.commands.import_model.derived_recipe", lambda *_: None)
    monkeypatch.setattr(COMMANDS[command][1], stopped)
    status, _, error = call(command, *arguments)
    assert (status, error) == (130, f"prunekit: interrupted; resume with: prunekit {resume}\n")


@pytest.mark.parametrize("given", [["--log-level", "warning"], ["--log-level=error"], ["--log-level=info"], []])
def test_log_level(call, monkeypatch, given):
    def run_recipe(recipe, out, console, **_):
        console.print("the report")
        Reporter(console).info("the progress")
        logging.getLogger("prunekit.runs.run_dir").warning("damaged")

    monkeypatch.setattr("prunekit.pipeline.runner.run_recipe", run_recipe)
    for arguments in (["run", *given, "csnet"], [*given, "run", "csnet"], ["run", "csnet", *given]):
        status, out, error = call(*arguments)
        assert status == 0
        assert out == ("" if "warning" in given or "--log-level=error" in given else "the report\nthe progress\n")
        assert error == ("" if "--log-level=error" in given else "prunekit: damaged\n")


@pytest.mark.parametrize("given", [["--log-level", "loud"], ["--log-level"], ["--log-level="]])
def test_unknown_log_level(call, given):
    status, _, error = call("list", *given)
    assert status == 2 and one_line(error) and "use one of debug, info, warning, error" in error


def test_list(call):
    status, out, _ = call("list")
    assert status == 0
    for word in (
        "csnet",
        "folder",
        "salient_shapes",
        "saliency",
        "dynamic",
        "gate",
        "adam",
        "one_cycle",
        "crop_flip",
        "csnet_duts",
    ):
        assert word in out
    assert max(map(len, out.splitlines())) <= 80


def test_prunekit_warnings_are_plain_lines(call, monkeypatch):
    import prunekit.config.recipe

    def load(*_):
        warnings.warn("first\nsecond", PrunekitWarning, stacklevel=1)
        warnings.warn("a library's", UserWarning, stacklevel=1)
        raise RecipeError("and the end")

    monkeypatch.setattr(prunekit.config.recipe, "load", load)
    shown = warnings.showwarning
    status, _, error = call("run", "x.yaml")
    ours = [line for line in error.splitlines() if line.startswith("prunekit: ")]
    assert status == 2 and ours == ["prunekit: first", "prunekit: second", "prunekit: and the end"]
    assert "a library's" not in "".join(ours)
    assert warnings.showwarning is shown


def test_a_failing_plugin_does_not_stop_commands(call, monkeypatch):
    def fail():
        raise ImportError("no module named foo")

    point = SimpleNamespace(name="bad", value="bad", load=fail, dist=SimpleNamespace(name="bad-dist", version="1.0"))
    monkeypatch.setattr(registry, "_plugins", registry._Plugins())
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: [point])
    status, out, error = call("groups", recipe())
    assert status == 0 and "groups can be pruned" in out
    assert one_line(error) and "plugin 'bad' of bad-dist failed to load" in error


def test_version(call):
    assert call("--version") == (0, f"{prunekit.__version__}\n", "")


def test_validate(call):
    assert call("validate", recipe(), "train.epochs=3") == (0, "# mine.yaml: valid\n", "")
    status, out, _ = call("validate", recipe(), "train.epochs=3", "--print")
    assert status == 0 and yaml.parse(out).value["train"]["epochs"] == 3
    assert out == "# mine.yaml: valid\n" + load("mine.yaml", ["train.epochs=3"]).dump()
    arguments = recipe(train="{epochs: -1, optimiser: adam}", extra="1"), "seed=x"
    errors = call("validate", *arguments)
    assert errors[0] == 2 and errors[2].count("\n") == 4 and errors == call("run", *arguments)
    assert not Path("runs").exists()


def test_help_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None;"
        "from prunekit.cli import main; main(['{}', '--help'])"
    )
    for command in ("run", "validate", "cp", "report", "predict", "eval", "groups", "list"):
        done = subprocess.run([sys.executable, "-c", code.format(command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout


def test_control_characters_are_escaped(call):
    status, _, error = call("run", "evil\x1b[2J\u202egnp.yaml")
    assert status == 2 and r"evil\x1b[2J\u202egnp.yaml" in error and "\x1b" not in error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory (MemoryError: no message); free memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory:\n you tried"),
            "out of memory (RuntimeError: Default",
        ),
        (ImportError("libx.so: failed to map segment from shared object"), "out of memory (ImportError: libx.so"),
        (RecursionError("maximum recursion depth exceeded"), "unexpected RecursionError: maximum recursion depth"),
        (RuntimeError("no\nluck"), "unexpected RuntimeError: no luck; run again with --debug"),
    ],
)
def test_any_error_is_one_line(call, monkeypatch, error, words):
    monkeypatch.setattr("prunekit.config.recipe.load", failing(error))
    status, _, said = call("validate", "csnet")
    assert status == 3 and one_line(said) and said.startswith(f"prunekit: {words}")


def test_too_little_memory_for_a_plugin_is_not_an_unknown_name(call, monkeypatch):
    plugins = registry._Plugins()
    monkeypatch.setattr(registry, "_plugins", plugins)
    broken = SimpleNamespace(name="x", value="x", dist=None, load=failing(MemoryError()))
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [broken])
    status, _, said = call("validate", "csnet")
    assert status == 3 and one_line(said) and "out of memory" in said


@contextlib.contextmanager
def unread(monkeypatch):
    """A pipe that nobody reads, in place of stdout and stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        patch.setattr(sys, "stderr", pipe)
        yield


@pytest.mark.parametrize("options", [[], ["--log-level", "info"], ["--debug", "--log-level=warning"]])
def test_a_run_goes_on_when_nobody_reads_its_output(monkeypatch, tmp_path, options):
    def run_recipe(recipe, out, console, **_):
        for _ in range(3):
            console.print("x" * 9000)
            print("y", file=sys.stderr, flush=True)
        out.mkdir(parents=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prunekit.pipeline.runner.run_recipe", run_recipe)
    with unread(monkeypatch), pytest.raises(SystemExit) as stop:
        main([*options, "run", "csnet", "--out", "run"])
    assert stop.value.code == 0 and (tmp_path / "run").is_dir()


@pytest.mark.parametrize("command, goes_on", [("profile", True), ("watch", False)])
def test_only_watch_stops_when_nobody_reads_its_output(monkeypatch, command, goes_on):
    done = []

    def talk(*_, **__):
        for _ in range(3):
            print("x" * 9000, flush=True)
        done.append(True)

    monkeypatch.setattr(f"prunekit.commands.{command}.{'profile_recipe' if goes_on else 'watch'}", talk)
    with unread(monkeypatch), pytest.raises(SystemExit):
        main(["--log-level", "info", command, "watch"])  # a folder called watch is no command
    assert bool(done) is goes_on


def test_an_error_that_nobody_reads_keeps_its_status(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        with pytest.raises(SystemExit) as stop:
            main(["validate", "no_recipe"])
        monkeypatch.undo()
    assert stop.value.code == 2
