"""What holds for all tests."""

from __future__ import annotations

import os

# Idle OpenMP threads sleep at once, in the services too: tests share the cores with them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
