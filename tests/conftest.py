"""One thread a test process: the networks are small, and tests run side by side."""

import os
import signal
import tempfile
from pathlib import Path

import torch

torch.set_num_threads(1)

# A shell ignores it for what it starts in the background, and a program keeps to that; what Ctrl-C does is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Not the user's own; the same for all processes and runs, so that the kernels are compiled once.
os.environ["PRUNEKIT_CACHE"] = str(Path(tempfile.gettempdir()) / f"prunekit-tests-{os.getuid()}")
