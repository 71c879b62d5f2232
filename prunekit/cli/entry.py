"""The entry point."""

from __future__ import annotations

import contextlib
import sys

from prunekit.cli.app import app
from prunekit.config.user_module import trust_modules
from prunekit.errors import RecipeError
from prunekit.utils import launcher
from prunekit.utils.exit_status import exit_on_error
from prunekit.utils.logging import LEVELS, terminal_logging
from prunekit.utils.signals import sigterm_as_interrupt
from prunekit.utils.streams import flush_or_discard, ignore_lost_readers


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``prunekit`` command."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    trust = "--trust" in arguments
    arguments = [argument for argument in arguments if argument not in ("--debug", "--trust")]
    level_name = _pop_log_level(arguments)
    # A command goes on when nobody reads its output, except the one that only shows something until it is stopped.
    output = contextlib.nullcontext() if arguments[:1] == ["watch"] else ignore_lost_readers()
    try:
        with output, exit_on_error(debug), launcher.silence_other_ranks():
            level = _level(level_name)
            launcher.exit_other_ranks(*arguments[:1])
            with sigterm_as_interrupt(), terminal_logging(level), trust_modules(trust):
                app(args=arguments, prog_name="prunekit")
    finally:
        flush_or_discard()


def _pop_log_level(arguments: list[str]) -> str:
    name = "info"
    for index, argument in reversed(list(enumerate(arguments))):
        option, equals, value = argument.partition("=")
        if option == "--log-level":
            name = value if equals else "".join(arguments[index + 1 : index + 2])
            del arguments[index : index + 1 if equals else index + 2]
    return name


def _level(name: str) -> int:
    if name not in LEVELS:
        raise RecipeError(f"--log-level {name}: unknown level; use one of {', '.join(LEVELS)}")
    return LEVELS[name]
