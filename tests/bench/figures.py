"""A line of the bench's report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One figure beside a peer's or a limit's, measured in the same run."""

    what: str
    miaotui: float
    peer: float
    peer_is: str
    unit: str

    @property
    def ratio(self) -> float:
        """Miaotui over the peer."""
        return self.miaotui / self.peer
