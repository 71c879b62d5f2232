import io
import logging
import sys
import warnings

import pytest
from rich.console import Console

from prunekit.errors import PrunekitWarning
from prunekit.utils.logging import LEVELS, is_quiet, progress_logger, record_logs, terminal_logging
from prunekit.utils.progress import Reporter


def log_everything(reporter):
    reporter.info("a line of progress")
    reporter.debug("a note")
    logging.getLogger("prunekit.runs.run_dir").warning("a state\nis damaged")
    logging.getLogger("library").error("it fails")
    logging.getLogger("library").info("below every level")
    warnings.warn("prunekit's", PrunekitWarning, stacklevel=1)
    warnings.warn("a library's", UserWarning, stacklevel=1)


LOGGED = ["a line of progress", "a note", "warning: a state", "warning: is damaged", "error: library: it fails"]
SHOWN = {
    "debug": (True, ["a note", "a state", "is damaged", "library: it fails", "prunekit's"]),
    "info": (True, ["a state", "is damaged", "library: it fails", "prunekit's"]),
    "warning": (False, ["a state", "is damaged", "library: it fails", "prunekit's"]),
    "error": (False, ["library: it fails"]),
}


@pytest.mark.parametrize("level", SHOWN)
def test_terminal_shows_its_level_and_the_log_everything(level, tmp_path, capsys, monkeypatch):
    # Replace pytest's hook.
    monkeypatch.setattr(warnings, "showwarning", lambda m, kind, *_: print(f"{kind.__name__}: {m}", file=sys.stderr))
    out = io.StringIO()
    reporter = Reporter(Console(file=out))
    reporter.log_file = tmp_path / "run.log"
    hooks = warnings.showwarning, logging.getLogger().handlers[:]
    with terminal_logging(LEVELS[level]), record_logs(reporter.write_log):
        log_everything(reporter)
        assert is_quiet() is (level in ("warning", "error"))
    assert (warnings.showwarning, logging.getLogger().handlers) == hooks and progress_logger.level == logging.NOTSET
    shows_info, lines = SHOWN[level]
    assert out.getvalue() == "a line of progress\n" * shows_info
    error = capsys.readouterr().err
    assert [line.removeprefix("prunekit: ") for line in error.splitlines() if line.startswith("prunekit: ")] == lines
    assert ("UserWarning: a library's" in error) is (level != "error")
    *log, last = [line.partition("  ")[2] for line in reporter.log_file.read_text().splitlines()]
    assert log == [*LOGGED, "warning: prunekit's"]
    assert last.startswith("warning: a library's (UserWarning, ") and "test_logging.py:" in last


def test_library_use_keeps_default_logging(capsys):
    out, logged, root = io.StringIO(), [], logging.getLogger()
    held, root.handlers = root.handlers, []  # pytest's own
    try:
        with record_logs(logged.append), pytest.warns(UserWarning):
            log_everything(Reporter(Console(file=out)))
    finally:
        root.handlers = held
    assert out.getvalue() == "a line of progress\n"
    assert capsys.readouterr().err == "a state\nis damaged\nit fails\n"
    assert "error: library: it fails" in logged


def test_exceptions_are_logged_with_their_traceback():
    logged = []
    with pytest.raises(ZeroDivisionError), record_logs(logged.append):
        _ = 1 / 0
    assert logged[0] == "Traceback (most recent call last):" and logged[-1] == "ZeroDivisionError: division by zero"
    assert not any("\n" in line for line in logged)
    with pytest.raises(KeyboardInterrupt), record_logs(logged.append):
        raise KeyboardInterrupt
    assert logged[-1].startswith("ZeroDivisionError")


def test_quiet_terminal_shows_no_progress():
    out = io.StringIO()
    with terminal_logging(logging.WARNING):
        reporter = Reporter(Console(file=out, force_terminal=True))
        with reporter.spinner("a stage"):
            reporter.info("a line")
    assert out.getvalue() == ""
