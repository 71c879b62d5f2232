"""The command line. Commands import torch themselves, so that ``--help`` is fast.

Importing it registers all commands. Imports everything.
"""

from prunekit.cli import make_runs, use_runs
from prunekit.cli.app import app
from prunekit.cli.entry import main

__all__ = ["app", "main", "make_runs", "use_runs"]
