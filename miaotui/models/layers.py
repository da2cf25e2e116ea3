"""Ranges of transformer layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from miaotui.models.errors import PartitionError


@dataclass(frozen=True, slots=True, order=True)
class LayerRange:
    """The layers `first <= index < end`; at least one.

    Raises:
        PartitionError: the range is empty or negative.
    """

    first: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.end:
            raise PartitionError(
                f"layer range {self.first}-{self.end} is empty or negative; "
                "write FIRST-END, END excluded, such as 0-6"
            )

    @classmethod
    def parse(cls, text: str) -> LayerRange:
        """Return the range that `text` ("FIRST-END", END excluded) names.

        Raises:
            PartitionError: it is not of that form.
        """
        first, separator, end = text.strip().partition("-")
        if not (separator and first.strip().isdecimal() and end.strip().isdecimal()):
            raise PartitionError(
                f"{text!r} is not a layer range; write FIRST-END, END excluded, such as 0-6"
            )
        return cls(int(first), int(end))

    def __len__(self) -> int:
        return self.end - self.first

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.end))

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and self.first <= layer < self.end

    def __str__(self) -> str:
        return f"{self.first}-{self.end}"
