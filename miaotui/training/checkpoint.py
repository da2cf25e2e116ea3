"""A run's state on disk, written so that a kill at any moment leaves a whole file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class RunState:
    """All that a run needs to go on as if it had not stopped.

    step: steps done. taken: the sampler's state at the start of the chunk that ``step`` is in.
    """

    step: int = 0
    taken: dict[str, int] = field(default_factory=dict)
    model: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    rng: Tensor | None = None
    seconds: float = 0.0


def save(state: RunState, path: Path) -> None:
    """Write beside ``path``, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(vars(state), part)
    os.replace(part, path)


def load(path: Path) -> RunState:
    """Raises FileNotFoundError when there is no checkpoint."""
    return RunState(**torch.load(path, map_location="cpu", weights_only=True))
