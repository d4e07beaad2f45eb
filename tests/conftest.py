"""What every test runs under: one thread, no network, the same random examples each time."""

import os

import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # tiny matrices: a second thread mostly waits, and kernels take a buffer for each
settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")
