"""One thread a test process: the networks are small, and tests run side by side."""

import torch

torch.set_num_threads(1)
