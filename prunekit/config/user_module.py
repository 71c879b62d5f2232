"""Builders in a Python file that a recipe names (``backbone.file``).

A resolved recipe names the file as ``/absolute/path/my_net.py#sha256=…``, with the first digits of its SHA-256, so that
a change is noticed. A file named by the user's own recipe is trusted. A file named by a run folder, which may come from
someone else, runs only if the user has run a file with the same content before (recorded in the cache folder) or passes
``--trust``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from prunekit.config.registry import describe_error
from prunekit.errors import PluginError, PrunekitError, RecipeError
from prunekit.utils.io import cache_folder, sha256
from prunekit.utils.text import closest_match, did_you_mean

DIGITS = 16
_PINNED_PATH = re.compile(r"(?P<path>.*)#sha256=(?P<digits>[0-9a-f]{8,64})", re.DOTALL)

_trusted: set[str] = set()
_trust_all = False
_modules: dict[tuple[Path, str], ModuleType] = {}


@dataclass(frozen=True)
class UserModule:
    """A Python file and its current content."""

    path: Path  # absolute
    data: bytes
    expected: str | None  # first digits of the SHA-256 in the recipe

    @classmethod
    def read(cls, text: str, folder: Path | None = None) -> UserModule:
        """Read the file that a recipe names.

        Args:
            text: its path, with or without ``#sha256=…``.
            folder: base of a relative path; None for the current folder.

        Raises:
            RecipeError: the file does not exist or cannot be read.
        """
        pinned = _PINNED_PATH.fullmatch(text)
        name = pinned["path"] if pinned else text
        try:
            path = ((folder or Path()) / Path(name).expanduser()).resolve()
            if not path.is_file():
                problem = "is a folder" if path.is_dir() else f"does not exist{did_you_mean(path)}"
                raise RecipeError(f"{path} {problem}; give the path of a Python file")
            str(path).encode()
            return cls(path, path.read_bytes(), pinned["digits"] if pinned else None)
        except OSError as error:
            raise RecipeError(
                f"{name!r} cannot be read ({error.strerror or error}); fix its permissions or path"
            ) from error
        except UnicodeEncodeError:
            raise RecipeError(f"{str(path)!r} is not UTF-8, so no recipe can record it; rename the folder") from None
        except (ValueError, RuntimeError) as error:
            raise RecipeError(f"{name!r} is not a valid file name ({describe_error(error)}); use another") from error

    @property
    def digest(self) -> str:
        return sha256(self.data)

    @property
    def pinned_path(self) -> str:
        """The path with the first digits of the current SHA-256, as in a resolved recipe."""
        return f"{self.path}#sha256={self.digest[:DIGITS]}"

    @property
    def change(self) -> str | None:
        """A message if the content is not the one that the recipe expects, else None."""
        if self.expected is None or self.digest.startswith(self.expected):
            return None
        current = self.digest[: len(self.expected)]
        return f"{self.path} has changed (expected sha256 {self.expected}, now {current})"

    def trust(self) -> None:
        """Record that the user runs this content."""
        _trusted.add(self.digest)
        # If the record cannot be written, the user has to pass --trust again.
        with contextlib.suppress(OSError):
            _records().mkdir(parents=True, exist_ok=True, mode=0o700)
            (_records() / self.digest).touch()

    def check_trusted(self) -> None:
        """Raise PluginError if the user has not run this content before and ``--trust`` is not given."""
        if _trust_all:
            self.trust()
        elif self.digest not in _trusted and not (_records() / self.digest).is_file():
            problem = self.change or f"{self.path} is code named by a run folder, and you have not run it before"
            raise PluginError(f"backbone.file: {problem}; read it, and repeat the command with --trust to run it")

    def load_function(self, name: str) -> Callable[..., Any]:
        """Return a function of the file, which is imported once per content.

        Raises:
            PluginError: the file fails to import, or has no such function.
        """
        key = self.path, self.digest
        if key not in _modules:
            _modules[key] = self._import(f"{self.path.stem}_{self.digest[:DIGITS]}")
        module = _modules[key]
        function = getattr(module, name, None)
        if not callable(function) or name.startswith("__"):
            functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            match = closest_match(name, functions)
            hint = f"; did you mean {match!r}?" if match else ""
            raise PluginError(f"{self.path} has no function {name!r}{hint}")
        return function

    def _import(self, name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, self.path)
        if spec is None:
            raise PluginError(f"{self.path} is not a Python file; its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        # Dataclasses with postponed annotations look up their module there.
        sys.modules[name] = module
        try:
            # Not through the loader: its bytecode cache mistakes a file of the same size and time for the same file.
            exec(compile(self.data, str(self.path), "exec", dont_inherit=True), module.__dict__)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            if isinstance(error, PrunekitError):
                raise
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            is_sibling = missing and any((self.path.parent / f"{missing}{end}").exists() for end in (".py", ""))
            fix = f"; it cannot import its siblings: make it and {missing} a package, or add the folder to PYTHONPATH"
            raise PluginError(
                f"{self.path} fails to import ({describe_error(error)}){fix if is_sibling else ''}"
            ) from error
        return module


def _records() -> Path:
    return cache_folder() / "trusted"


@contextlib.contextmanager
def trust_modules(trust_all: bool = True) -> Iterator[None]:
    """Within ``with``, trust every file that a run folder names."""
    global _trust_all
    before, _trust_all = _trust_all, trust_all
    try:
        yield
    finally:
        _trust_all = before
