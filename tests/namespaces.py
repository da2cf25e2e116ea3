"""Network namespaces as separate hosts, with links between them that can be slow or broken.

Host i is reached from this process at `Hosts.outside(i)`, without delay; every two hosts reach
each other at `Hosts.address(i)` over a link of their own (tests/wire.py). Needs root and `ip`
(iproute2).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parent.parent
_DEVICE = "cable"


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


class Link:
    """What happens to packets between two hosts; the same both ways."""

    def __init__(self, hosts: Hosts, first: int, second: int) -> None:
        self._hosts = hosts
        self._ends = f"{first} {second}"

    def delay(self, seconds: float) -> None:
        """Sets the one-way delay."""
        self._tell(f"delay {seconds}")

    def jitter(self, seconds: float) -> None:
        """Sets by how much more, at most, a packet may be delayed."""
        self._tell(f"jitter {seconds}")

    def loss(self, share: float) -> None:
        """Sets the share of packets that are lost."""
        self._tell(f"loss {share}")

    def rate(self, bytes_a_second: float) -> None:
        """Sets how much passes in a second, each way; 0: any amount."""
        self._tell(f"rate {bytes_a_second}")

    def cut(self) -> None:
        """Packets vanish."""
        self._tell("cut")

    def mend(self) -> None:
        """Undoes `cut`."""
        self._tell("mend")

    def reset(self) -> None:
        """Undoes everything."""
        self._tell("reset")

    def _tell(self, what: str) -> None:
        self._hosts.tell(f"{self._ends} {what}")


class Hosts:
    """`with Hosts(3) as hosts: …` makes three hosts, and removes them afterwards."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._names = [f"miaotui-{os.getpid()}-{index}" for index in range(count)]
        self._wire: subprocess.Popen[str] | None = None
        # Two runs at once must not take the same addresses.
        self._net = 16 + os.getpid() % 200
        self._cables = [f"mt{self._net}o{index}" for index in range(count)]

    def outside(self, host: int) -> str:
        """The address of a host for this process."""
        return f"10.{self._net}.{host}.2"

    def address(self, host: int) -> str:
        """The address of a host for the other hosts, and for itself."""
        return f"10.{self._net}.200.{host + 1}"

    def command(self, host: int, argv: Sequence[str]) -> list[str]:
        """A command line that runs `argv` on a host."""
        ip = shutil.which("ip")
        assert ip is not None
        return [ip, "netns", "exec", self._names[host], *argv]

    def link(self, first: int, second: int) -> Link:
        """The link between two hosts."""
        assert first != second, "a host has no link to itself"
        return Link(self, first, second)

    def capture(self, path: Path | None) -> None:
        """Writes every packet between hosts to a pcap file, until told None."""
        self.tell("capture" if path is None else f"capture {path}")

    def tell(self, line: str) -> None:
        """Gives the wire a command; from now on it holds."""
        assert self._wire is not None
        assert self._wire.stdin is not None
        assert self._wire.stdout is not None
        self._wire.stdin.write(line + "\n")
        self._wire.stdin.flush()
        assert self._wire.stdout.readline() == "done\n", f"the links do not take {line!r}"

    def __enter__(self) -> Self:
        _remove_orphans()
        try:
            for index, name in enumerate(self._names):
                self._make(index, name)
            self._connect()
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
        ours, theirs = self._cables[index], f"mt{self._net}i{index}"
        _ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        _ip("addr", "add", f"10.{self._net}.{index}.1/24", "dev", ours)
        _ip("link", "set", ours, "up")
        _ip("-n", name, "addr", "add", f"{self.outside(index)}/24", "dev", theirs)
        for device in ("lo", theirs):
            _ip("-n", name, "link", "set", device, "up")

    def _connect(self) -> None:
        ends = [f"{name}:{_DEVICE}:{self.address(index)}" for index, name in enumerate(self._names)]
        self._wire = subprocess.Popen(
            [sys.executable, "-m", "tests.wire", *ends],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,  # Ctrl-C is for us: services still use the network then
        )
        assert self._wire.stdout is not None
        assert self._wire.stdout.readline() == "ready\n", "the links could not be made"
        for index, name in enumerate(self._names):
            _ip("-n", name, "addr", "add", f"{self.address(index)}/24", "dev", _DEVICE)
            _ip("-n", name, "link", "set", _DEVICE, "mtu", "16000", "up")

    def _remove(self) -> None:
        if self._wire is not None:
            self._wire.communicate("")
            self._wire = None
        for name, cable in zip(self._names, self._cables, strict=True):
            # The kernel clears a removed namespace away when it likes: until then a cable into it
            # would keep its name and addresses from the next.
            _ip("link", "del", cable, check=False)
            _ip("netns", "del", name, check=False)


def _remove_orphans() -> None:
    """Removes namespaces of runs that were killed."""
    for line in _ip("netns", "list", check=False).stdout.splitlines():
        name = line.split()[0] if line.split() else ""
        made = re.fullmatch(r"miaotui-(?:try-)?(\d+)(?:-\d+)?", name)
        if made and not Path(f"/proc/{made[1]}").exists():
            _ip("netns", "del", name, check=False)


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done
