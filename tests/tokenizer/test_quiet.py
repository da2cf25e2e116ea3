"""What native decoders write to standard error is left out, and nothing else is."""

from __future__ import annotations

import subprocess
from sys import executable

# Two decoders at once, the second of which outlasts the first; what is written when, by whom.
_PROGRAM = """
import logging, os, sys, threading, warnings
from miaotui.telemetry import setup_logging
from services.tokenizer.quiet import native_silence

def native(text):
    os.write(2, (text + "\\n").encode())

setup_logging("tokenizer")
log = logging.getLogger("a")
native("native before")
begun, over = threading.Event(), threading.Event()

def other():
    with native_silence():
        begun.set()
        over.wait()
        native("native in the second")

thread = threading.Thread(target=other)
try:
    with native_silence():
        thread.start()
        begun.wait()
        native("native in both")
        log.info("logged in both")
        print("printed in both", file=sys.stderr)
        raise ValueError
except ValueError:
    pass
native("native after the first")
log.info("logged after the first")
over.set()
thread.join()
native("native after both")
log.info("logged after both")
with native_silence():
    native("native again")
    raise RuntimeError("uncaught")
"""


def test_python_is_heard_while_native_code_is_not() -> None:
    done = subprocess.run(
        [executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=300, check=False
    )
    lines = done.stderr.splitlines()
    told = [line.rpartition(": ")[2] for line in lines]
    assert told[:6] == [
        "native before",
        "logged in both",
        "printed in both",
        "logged after the first",
        "native after both",
        "logged after both",
    ]
    assert lines[-1] == "RuntimeError: uncaught"
    assert "native again" not in done.stderr
