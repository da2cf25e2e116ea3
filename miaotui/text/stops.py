"""Stop strings: text up to the first of them, though it comes bit by bit."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Lets text through, but for an end that may be the beginning of a stop string."""

    __slots__ = ("_held", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: none of them empty."""
        self._stops = stops
        self._held = ""
        self.matched = False
        """Whether a stop string has come: nothing of it, and nothing after it, gets through."""

    def feed(self, text: str) -> str:
        """Takes more text and returns what is certain to stand before any stop string."""
        if not self._stops:
            return text
        if self.matched:
            return ""
        text = self._held + text
        places = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            self.matched, self._held = True, ""
            return text[: min(places)]
        certain = min(_beginning(text, stop) for stop in self._stops)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back; no more text follows."""
        held, self._held = self._held, ""
        return held


def _beginning(text: str, stop: str) -> int:
    """Where the longest end of `text` begins that is a beginning of `stop`."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return at
        at = text.find(stop[0], at + 1)
    return len(text)
