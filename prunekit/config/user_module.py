"""Builders in a plain Python file that a recipe names: found from any folder, and noticed when they change.

A recipe that was read names its file as ``/the/whole/path/my_net.py#sha256=…``, the first digits of the file's
SHA-256. So the run folder, its plan and its weights know the code that they were made with.

A recipe that its user runs may name any file: that is the user's word. A run folder may come from somebody else, and
what it names is run only where this user has run a file of the same content before (its SHA-256 is noted in the cache
folder), or says so now (``--trust``). Two other rules were weighed: to run what lies outside of the folder, which
whoever knows where folders are unpacked gets round; and to ask for the word always, which every ``predict`` would pay.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from prunekit.config.registry import closest_match, describe_error
from prunekit.errors import PluginError, PrunekitError, RecipeError
from prunekit.utils.io import cache_folder

DIGITS = 16
_PINNED = re.compile(r"(?P<path>.*)#sha256=(?P<digits>[0-9a-f]{8,64})", re.DOTALL)

_known: set[str] = set()
_trusting = False
_modules: dict[tuple[Path, str], ModuleType] = {}


@dataclass(frozen=True)
class UserModule:
    """A Python file as it is now.

    Attributes:
        path: absolute.
        data: its content.
        expected: the digits of the SHA-256 that it had when it was noted; None where they were not.
    """

    path: Path
    data: bytes
    expected: str | None

    @classmethod
    def read(cls, text: str, folder: Path | None = None) -> UserModule:
        """Read the file that a recipe names.

        Args:
            text: its path, with or without ``#sha256=…``.
            folder: what a relative path is relative to; None for the current folder.

        Raises:
            RecipeError: there is no such file, or it cannot be read.
        """
        pinned = _PINNED.fullmatch(text)
        name = pinned["path"] if pinned else text
        try:
            path = ((folder or Path()) / Path(name).expanduser()).resolve()
            if not path.is_file():
                what = "is a folder" if path.is_dir() else "is not there"
                raise RecipeError(f"{path} {what}; give the path of a Python file")
            return cls(path, path.read_bytes(), pinned["digits"] if pinned else None)
        except OSError as error:
            raise RecipeError(
                f"{name!r} cannot be read ({error.strerror or error}); mend its permissions or path"
            ) from error
        except (ValueError, RuntimeError) as error:
            raise RecipeError(f"{name!r} is not a usable file name ({describe_error(error)}); give another") from error

    @property
    def digest(self) -> str:
        """The SHA-256 of the content, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pinned_path(self) -> str:
        """The path and the first digits of the SHA-256 that the file has now, as a recipe holds them."""
        return f"{self.path}#sha256={self.digest[:DIGITS]}"

    @property
    def change(self) -> str | None:
        """What is to be said where the file is not the one that was noted, else None."""
        if self.expected is None or self.digest.startswith(self.expected):
            return None
        now = self.digest[: len(self.expected)]
        return f"{self.path} has changed since it was noted (sha256 {self.expected}, now {now})"

    def trust(self) -> None:
        """Note that the user has this content run."""
        _known.add(self.digest)
        # Where the note cannot be written, the user will be asked again.
        with contextlib.suppress(OSError):
            _notes().mkdir(parents=True, exist_ok=True, mode=0o700)
            (_notes() / self.digest).touch()

    def check_trusted(self) -> None:
        """See that the user has vouched for this content.

        Raises:
            PluginError: not yet, and nobody says so now.
        """
        if _trusting:
            self.trust()
        elif self.digest not in _known and not (_notes() / self.digest).is_file():
            what = self.change or f"{self.path} is code that a run folder names, and that you have not run before"
            raise PluginError(f"backbone.file: {what}; read it, and give the command again with --trust to run it")

    def load_function(self, name: str) -> Callable[..., Any]:
        """The function of this name in the file, which is imported once for each content that it has.

        Raises:
            PluginError: the file fails to import, or has no such function.
        """
        module = self._module()
        function = getattr(module, name, None)
        if not callable(function):
            own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            near = closest_match(name, own)
            raise PluginError(f"{self.path} has no function {name!r}" + (f"; did you mean {near!r}?" if near else ""))
        return function

    def _module(self) -> ModuleType:
        key = self.path, self.digest
        if key not in _modules:
            _modules[key] = self._import(f"{self.path.stem}_{self.digest[:DIGITS]}")
        return _modules[key]

    def _import(self, name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, self.path)
        if spec is None:
            raise PluginError(f"{self.path} is no Python file; its name should end in .py")
        module = importlib.util.module_from_spec(spec)
        # Dataclasses with postponed annotations look their module up there.
        sys.modules[name] = module
        try:
            # Not by the loader: its bytecode cache takes a file of the same size and second for the same.
            exec(compile(self.data, str(self.path), "exec", dont_inherit=True), module.__dict__)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            if isinstance(error, PrunekitError):
                raise
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            beside = missing and any((self.path.parent / f"{missing}{end}").exists() for end in (".py", ""))
            mend = f"; a plain file stands alone: make it and {missing} a package, or add its folder to PYTHONPATH"
            raise PluginError(
                f"{self.path} fails to import ({describe_error(error)}){mend if beside else ''}"
            ) from error
        return module


def _notes() -> Path:
    return cache_folder() / "trusted"


@contextlib.contextmanager
def trust_modules(wanted: bool = True) -> Iterator[None]:
    """Within, the user vouches for whatever file a run folder names."""
    global _trusting
    before, _trusting = _trusting, wanted
    try:
        yield
    finally:
        _trusting = before
