"""A process of its own for one side of a comparison, asked one line of JSON at a time.

Sides that share a process would share its interpreter lock and its threads' habits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self


class Child:
    """Runs `python -m module *arguments`, which calls `answer_lines`."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __call__(self, what: str, **arguments: Any) -> Any:
        """The child's answer to one question; `RuntimeError` where it has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # the end of its output says so, too
            print(json.dumps({"what": what, **arguments}), file=self._process.stdin)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._module} ended; its error is above")
        return json.loads(line)


def answer_lines(**answers: Callable[..., Any]) -> None:
    """Serves a parent's questions by the function of the same name, until its input ends."""
    # What libraries print must not get between the answers.
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        for line in sys.stdin:
            arguments = json.loads(line)
            print(json.dumps(answers[arguments.pop("what")](**arguments)), file=output, flush=True)
