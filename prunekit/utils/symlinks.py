"""Protection against links in an untrusted run folder, through which files elsewhere would be read or overwritten."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from prunekit.errors import RunFolderError


def check_no_external_links(folder: Path) -> None:
    """Raise RunFolderError for a link that leads out of a folder, or a pipe or device, which blocks readers, in it."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            shown = "".join(c if c.isprintable() else "?" for c in path)
            try:
                mode = os.lstat(path).st_mode
            except OSError:
                continue  # It was removed in the meantime.
            if stat.S_ISLNK(mode):
                if leads_out(path, folder):
                    raise RunFolderError(f"{shown} is a link that leads out of the run folder; replace it by a copy")
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise RunFolderError(f"{shown} is neither a file nor a folder; remove it")


def leads_out(link: str | Path, folder: Path) -> bool:
    """Return whether a link leads to something that is not in the folder."""
    root = os.path.realpath(folder)
    return os.path.commonpath([root, os.path.realpath(link)]) != root
