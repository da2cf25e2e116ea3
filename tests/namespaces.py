"""Network namespaces as separate hosts, with cables between them that can be slow or broken.

Host i is reached from this process at `Hosts.outside(i)`, without delay; neighbours i and i + 1
reach each other over a cable (tests/wire.py). Needs root and `ip` (iproute2).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parent.parent


def missing() -> str:
    """Why namespaces cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the program ip is missing: apt-get install iproute2"
    if not Path("/dev/net/tun").exists():
        return "this kernel has no TUN devices"
    made = _ip("netns", "add", f"miaotui-try-{os.getpid()}", check=False)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    _ip("netns", "del", f"miaotui-try-{os.getpid()}")
    return ""


class Hosts:
    """`with Hosts(3) as hosts: …` makes three hosts in a row, and removes them afterwards."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._names = [f"miaotui-{os.getpid()}-{index}" for index in range(count)]
        self._wires: list[subprocess.Popen[str]] = []
        # Two runs at once must not take the same addresses.
        self._net = 16 + os.getpid() % 200

    def outside(self, host: int) -> str:
        """The address of a host for this process."""
        return f"10.{self._net}.{host}.2"

    def inside(self, host: int, seen_from: int) -> str:
        """The address of a host for its neighbour."""
        wire, side = min(host, seen_from), 1 if host < seen_from else 2
        assert abs(host - seen_from) == 1, "only neighbours have a cable"
        return f"10.{self._net}.{100 + wire}.{side}"

    def command(self, host: int, argv: Sequence[str]) -> list[str]:
        """A command line that runs `argv` on a host."""
        ip = shutil.which("ip")
        assert ip is not None
        return [ip, "netns", "exec", self._names[host], *argv]

    def delay(self, wire: int, seconds: float) -> None:
        """Sets the one-way delay of the cable between hosts `wire` and `wire` + 1."""
        self._tell(wire, f"delay {seconds}")

    def loss(self, wire: int, share: float) -> None:
        """Sets the share of packets that a cable loses."""
        self._tell(wire, f"loss {share}")

    def cut(self, wire: int) -> None:
        """Stops a cable: packets vanish."""
        self._tell(wire, "cut")

    def mend(self, wire: int) -> None:
        """Undoes `cut`."""
        self._tell(wire, "mend")

    def __enter__(self) -> Self:
        try:
            for index, name in enumerate(self._names):
                self._make(index, name)
            for index in range(self.count - 1):
                self._connect(index)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _make(self, index: int, name: str) -> None:
        _ip("netns", "add", name)
        ours, theirs = f"mt{self._net}o{index}", f"mt{self._net}i{index}"
        _ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        _ip("addr", "add", f"10.{self._net}.{index}.1/24", "dev", ours)
        _ip("link", "set", ours, "up")
        _ip("-n", name, "addr", "add", f"{self.outside(index)}/24", "dev", theirs)
        for device in ("lo", theirs):
            _ip("-n", name, "link", "set", device, "up")

    def _connect(self, wire: int) -> None:
        device = f"cable{wire}"
        ends = [f"{self._names[host]}:{device}" for host in (wire, wire + 1)]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.wire", *ends],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self._wires.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", "the cable could not be made"
        for own, other in ((wire, wire + 1), (wire + 1, wire)):
            name = self._names[own]
            address = [self.inside(own, other), "peer", self.inside(other, own)]
            _ip("-n", name, "addr", "add", *address, "dev", device)
            _ip("-n", name, "link", "set", device, "mtu", "16000", "up")

    def _tell(self, wire: int, line: str) -> None:
        pipe = self._wires[wire].stdin
        assert pipe is not None
        pipe.write(line + "\n")
        pipe.flush()

    def _remove(self) -> None:
        for process in self._wires:
            process.communicate("")
        self._wires.clear()
        for name in self._names:
            _ip("netns", "del", name, check=False)


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)
