"""What is said aloud, how loud, and what the log of a run gets of it."""

import io
import logging
import sys
import warnings

import pytest
from rich.console import Console

from prunekit.errors import PrunekitWarning
from prunekit.utils.logging import LEVELS, is_quiet, progress_logger, record_logs, terminal_logging
from prunekit.utils.progress import Reporter


def everything(reporter):
    reporter.info("a line of the course")
    reporter.debug("a note")
    logging.getLogger("prunekit.runs.run_dir").warning("a state\nis damaged")
    logging.getLogger("library").error("it fails")
    logging.getLogger("library").info("too quiet for anybody")
    warnings.warn("of ours", PrunekitWarning, stacklevel=1)
    warnings.warn("a library's", UserWarning, stacklevel=1)


NOTED = ["a line of the course", "a note", "warning: a state", "warning: is damaged", "error: library: it fails"]
SHOWN = {
    "debug": (True, ["a note", "a state", "is damaged", "library: it fails", "of ours"]),
    "info": (True, ["a state", "is damaged", "library: it fails", "of ours"]),
    "warning": (False, ["a state", "is damaged", "library: it fails", "of ours"]),
    "error": (False, ["library: it fails"]),
}


@pytest.mark.parametrize("level", SHOWN)
def test_the_terminal_shows_what_its_level_lets_through_and_the_log_gets_all(level, tmp_path, capsys, monkeypatch):
    # pytest has put its own there.
    monkeypatch.setattr(warnings, "showwarning", lambda m, kind, *_: print(f"{kind.__name__}: {m}", file=sys.stderr))
    out = io.StringIO()
    reporter = Reporter(Console(file=out))
    reporter.log_file = tmp_path / "run.log"
    hooks = warnings.showwarning, logging.getLogger().handlers[:]
    with terminal_logging(LEVELS[level]), record_logs(reporter.write_log):
        everything(reporter)
        assert is_quiet() is (level in ("warning", "error"))
    assert (warnings.showwarning, logging.getLogger().handlers) == hooks and progress_logger.level == logging.NOTSET
    told, lines = SHOWN[level]
    assert out.getvalue() == "a line of the course\n" * told
    error = capsys.readouterr().err
    assert [line.removeprefix("prunekit: ") for line in error.splitlines() if line.startswith("prunekit: ")] == lines
    assert ("UserWarning: a library's" in error) is (level != "error")
    *log, last = [line.partition("  ")[2] for line in reporter.log_file.read_text().splitlines()]
    assert log == [*NOTED, "warning: of ours"]
    assert last.startswith("warning: a library's (UserWarning, ") and "test_logs.py:" in last


def test_from_python_everything_is_as_loud_as_ever(capsys):
    out, noted, root = io.StringIO(), [], logging.getLogger()
    held, root.handlers = root.handlers, []  # pytest's own
    try:
        with record_logs(noted.append), pytest.warns(UserWarning):
            everything(Reporter(Console(file=out)))
    finally:
        root.handlers = held
    assert out.getvalue() == "a line of the course\n"
    assert capsys.readouterr().err == "a state\nis damaged\nit fails\n"
    assert "error: library: it fails" in noted


def test_what_breaks_a_run_off_is_noted_with_its_traceback():
    noted = []
    with pytest.raises(ZeroDivisionError), record_logs(noted.append):
        _ = 1 / 0
    assert noted[0] == "Traceback (most recent call last):" and noted[-1] == "ZeroDivisionError: division by zero"
    assert not any("\n" in line for line in noted)
    with pytest.raises(KeyboardInterrupt), record_logs(noted.append):
        raise KeyboardInterrupt
    assert noted[-1].startswith("ZeroDivisionError")


def test_a_quiet_terminal_draws_nothing():
    out = io.StringIO()
    with terminal_logging(logging.WARNING):
        reporter = Reporter(Console(file=out, force_terminal=True))
        with reporter.spinner("a stage"):
            reporter.info("a line")
    assert out.getvalue() == ""
