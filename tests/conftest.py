"""What every test runs under: few threads, no network, the same random examples each time."""

import os

import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(min(2, os.cpu_count() or 1))
settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")
