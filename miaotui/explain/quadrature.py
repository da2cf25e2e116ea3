"""Integrals along the path from baseline to input, whose error can be seen while they are made.

Integrated gradients (Sundararajan, Taly and Yan 2017, arXiv:1703.01365) attribute to each input
the integral of its gradient along a straight path. Summed over all inputs, the integrand is the
derivative of the logit along the path, so over *every piece* of the path the sum must be the
difference of the logit at the piece's ends, which is known. The rule is Simpson's: it takes a
piece's ends, so the difference costs nothing, and its middle, so a piece that is off is halved for
two new points. Rules of higher order ask for more and gain nothing by it, as the logit turns where
words come to be read as such: Gauss and Lobatto's with five points took 1.3 times as many points
(22 windows of English and Chinese, the bundled model) for the same error by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

DEFAULT_MAX_POINTS = 193
# Of the ends and the middle, for a piece of length 1.
_WEIGHTS = (1 / 6, 4 / 6, 1 / 6)
# The middle of each half.
_POINTS_OF_A_SPLIT = 2


@dataclass(frozen=True, slots=True)
class Integral:
    """The integral over [0, 1].

    `total`: float64 [inputs]; `start` and `end`: the function at 0 and 1; `points`: where
    gradients were taken, ascending, and `weights` their weights, float64 [points];
    `within`: whether the tolerance was reached before the points ran out.
    """

    total: Vector
    start: float
    end: float
    points: Vector
    weights: Vector
    within: bool

    @property
    def gap(self) -> float:
        """The sum of `total` minus what it should be."""
        return float(self.total.sum()) - (self.end - self.start)


@dataclass(frozen=True, slots=True)
class _Piece:
    low: float
    high: float

    @property
    def length(self) -> float:
        return self.high - self.low

    @property
    def points(self) -> tuple[float, float, float]:
        return (self.low, (self.low + self.high) / 2, self.high)

    def halves(self) -> tuple[_Piece, _Piece]:
        _, middle, _ = self.points
        return _Piece(self.low, middle), _Piece(middle, self.high)


class PathIntegral:
    """Says where to take gradients, until the integral's error is within the tolerance.

    Ask `wanted`, give what was found to `add`, until nothing is wanted.
    """

    def __init__(
        self,
        *,
        relative: float = 0.01,
        absolute: float = 0.02,
        max_points: int = DEFAULT_MAX_POINTS,
        pieces: int = 4,
    ) -> None:
        """`relative` and `absolute`: tolerances of the sum, of which the larger counts.

        Raises:
            ValueError: `max_points` has no room for the first `pieces`.
        """
        if max_points < 2 * pieces + 1:
            raise ValueError(f"max_points is {max_points}; it must be at least {2 * pieces + 1}")
        self._relative, self._absolute = relative, absolute
        self._max_points = max_points
        self._pieces = [_Piece(i / pieces, (i + 1) / pieces) for i in range(pieces)]
        self._done: list[_Piece] = []
        self._values: dict[float, float] = {}
        self._slopes: dict[float, Vector] = {}
        self._within = False

    def wanted(self) -> list[float]:
        """The points to evaluate next, ascending; empty where the integral is done."""
        points = {point for piece in self._pieces for point in piece.points}
        return sorted(points - self._values.keys())

    def add(self, points: Sequence[float], values: Sequence[float], slopes: Vector) -> None:
        """Takes the function and, by input, its derivative along the path: [points, inputs].

        Once all that was wanted is there, pieces whose error is too great are halved.
        """
        for point, value, slope in zip(points, values, slopes, strict=True):
            self._values[point] = float(value)
            self._slopes[point] = np.asarray(slope, np.float64)
        if not self.wanted():
            self._refine()

    def result(self) -> Integral:
        """The integral, by the pieces that were evaluated last; `add` must have been called."""
        weights: dict[float, float] = dict.fromkeys(self._values, 0.0)
        for piece in self._done:
            for point, weight in zip(piece.points, _WEIGHTS, strict=True):
                weights[point] += weight * piece.length
        points = np.array(sorted(weights))
        ordered = np.array([weights[point] for point in points])
        slopes = np.stack([self._slopes[point] for point in points])
        return Integral(
            total=ordered @ slopes,
            start=self._values[0.0],
            end=self._values[1.0],
            points=points,
            weights=ordered,
            within=self._within,
        )

    def _refine(self) -> None:
        self._done = list(self._pieces)
        errors = {piece: abs(self._error(piece)) for piece in self._pieces}
        left = sum(errors.values())
        change = abs(self._values[1.0] - self._values[0.0])
        tolerance = max(self._relative * change, self._absolute)
        self._within = left <= tolerance
        if self._within:
            return
        room = (self._max_points - len(self._values)) // _POINTS_OF_A_SPLIT
        # The worst first, until what stays as it is takes up half of the tolerance at most.
        for piece in sorted(errors, key=lambda piece: -errors[piece]):
            if left <= tolerance / 2 or room < 1:
                break
            self._pieces.remove(piece)
            self._pieces.extend(piece.halves())
            left -= errors[piece]
            room -= 1

    def _error(self, piece: _Piece) -> float:
        found = sum(
            weight * piece.length * float(self._slopes[point].sum())
            for point, weight in zip(piece.points, _WEIGHTS, strict=True)
        )
        return found - (self._values[piece.high] - self._values[piece.low])
