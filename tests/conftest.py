"""One thread a test process: the networks are small, and tests run side by side."""

import os
import tempfile
from pathlib import Path

import torch

torch.set_num_threads(1)

# Not the user's own; the same for all processes and runs, so that the kernels are compiled once.
os.environ["PRUNEKIT_CACHE"] = str(Path(tempfile.gettempdir()) / f"prunekit-tests-{os.getuid()}")
