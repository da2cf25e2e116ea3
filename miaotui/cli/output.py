"""What `miaotui up` prints: its own lines and those of the services, each with its name."""

from __future__ import annotations

import re
from collections import deque

from rich.console import Console
from rich.text import Text

_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "bright_red")
_ROUTINE = re.compile(r"\b(DEBUG|INFO)\b")
# Enough to show why a service died, with a Python traceback.
KEPT_LINES = 40


class Output:
    """Prints to one console; keeps each service's last lines for error messages."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        """`quiet` leaves out the services' DEBUG and INFO lines."""
        self.console = console
        self._quiet = quiet
        self._styles: dict[str, str] = {}
        self._tails: dict[str, deque[str]] = {}
        self._width = len("miaotui")

    def register(self, name: str) -> None:
        """Introduces a service, for its colour and the width of the names' column."""
        self._styles[name] = _COLOURS[len(self._styles) % len(_COLOURS)]
        self._tails[name] = deque(maxlen=KEPT_LINES)
        self._width = max(self._width, len(name))

    def say(self, message: str, style: str = "bold") -> None:
        """A line of the supervisor's own."""
        self._line("miaotui", "bold", Text(message, style=style))

    def child(self, name: str, line: str) -> None:
        """A line that a service wrote."""
        self._tails[name].append(line)
        if self._quiet and _ROUTINE.search(line[:80]):
            return
        self._line(name, self._styles[name], Text(line))

    def tail(self, name: str, lines: int = KEPT_LINES) -> list[str]:
        """The service's last lines."""
        return list(self._tails[name])[-lines:]

    def _line(self, name: str, style: str, text: Text) -> None:
        prefix = Text(f"{name:>{self._width}} │ ", style=style)
        # A line must stay one line in a log, however narrow the terminal is.
        self.console.print(prefix + text, soft_wrap=True, highlight=False)
