"""A run folder from somebody else may hold links: to be read through, and worse, to be written through."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from prunekit.errors import RunFolderError


def check_no_external_links(folder: Path) -> None:
    """See that all in a folder is in it: files, folders, and links that stay within; the folder may be a link itself.

    (To look at each file when it is opened was weighed: it is asked for in many places, the lock and the log among
    them, and one that forgets is enough.)

    Raises:
        RunFolderError: a link leads out of the folder, or something is neither file nor folder (a pipe would let its
            reader wait for ever).
    """
    root = os.path.realpath(folder)
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(where, name)
            try:
                mode = os.lstat(path).st_mode
            except OSError:
                continue  # Gone meanwhile; whoever needs it will say so.
            if stat.S_ISLNK(mode):
                if os.path.commonpath([root, os.path.realpath(path)]) != root:
                    raise RunFolderError(
                        f"{_shown(path)} is a link that leads out of the run folder; put what it points to in its place"
                    )
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise RunFolderError(f"{_shown(path)} is neither a file nor a folder; remove it")


def _shown(path: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in path)
