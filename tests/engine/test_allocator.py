"""What the C allocator does with freed buffers, in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import sys
from miaotui.engine.allocator import return_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

if sys.argv[1] == "set":
    assert return_freed_memory()
bytearray(900_000)  # freed at once: from now on glibc takes such buffers from its heap
before = resident()
kept, buffers = [], []
for _ in range(60):
    kept.append(bytearray(b"x") * 40_000)
    buffers.append(bytearray(b"y") * 900_000)
buffers.clear()
print(resident() - before - 60 * 40_000)
"""


def _left(setting: str) -> int:
    command = [sys.executable, "-c", _PROGRAM, setting]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
def test_freed_buffers_are_returned_though_others_are_kept_between_them() -> None:
    assert _left("set") < 4_000_000
    assert _left("as it is") > 40_000_000, "without the setting, nothing is returned"
