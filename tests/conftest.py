"""Settings of every test: deterministic, offline, on one thread."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # tests state what holds on the CPU in float32

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "dyvte", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("dyvte")
torch.set_num_threads(1)
