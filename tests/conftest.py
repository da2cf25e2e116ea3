"""What holds for all tests."""

from __future__ import annotations

import os

# As the shards do: idle OpenMP threads sleep, so that tests and services share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
