"""A network between network namespaces, in which every two hosts have a link of their own.

`python -m tests.wire NAMESPACE:DEVICE:ADDRESS …` makes a TUN device in each namespace and
carries IPv4 packets between them in user space, so that it needs no kernel module (netem is
missing from many kernels). Prints "ready"; then takes lines on its standard input, about the
link between two hosts, which are counted from 0:

    LEFT RIGHT delay SECONDS     each way
    LEFT RIGHT jitter SECONDS    at most so much more, drawn for each packet; order is kept
    LEFT RIGHT loss SHARE        of packets, by chance
    LEFT RIGHT rate BYTES        a second, each way; 0: any
    LEFT RIGHT cut | mend        nothing passes, or again
    LEFT RIGHT reset             as at the beginning
    capture PATH | capture       all packets of all links go to a pcap file, or no longer

Ends when its input does. Needs root.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import selectors
import socket
import struct
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_LONGEST_PACKET = 65_536
# As netem's: what does not fit into a link's queue is lost.
QUEUE_PACKETS = 1000
# pcap's magic number, version, zone, accuracy, longest packet, and "raw IP".
_PCAP_HEADER = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, _LONGEST_PACKET, 101)


def open_tun(namespace: str, device: str) -> int:
    """Make a TUN device in a namespace and return its non-blocking descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    other = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(other, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns to {namespace}")
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        request = struct.pack("16sH", device.encode(), _IFF_TUN | _IFF_NO_PI)
        fcntl.ioctl(tun, _TUNSETIFF, request)
    finally:
        libc.setns(own, _CLONE_NEWNET)
        os.close(own)
        os.close(other)
    return tun


@dataclass
class _Way:
    """One direction of a link."""

    last_due: float = 0.0
    free_at: float = 0.0  # when the packets before are sent, at the link's rate
    waiting: int = 0


@dataclass
class Link:
    """What happens to packets between two hosts; the same both ways."""

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    rate: float = 0.0
    is_cut: bool = False
    ways: tuple[_Way, _Way] = field(default_factory=lambda: (_Way(), _Way()))

    def due(self, way: _Way, length: int, now: float) -> float | None:
        """When a packet of `length` bytes that is sent now arrives; None: it is lost."""
        if self.is_cut or way.waiting >= QUEUE_PACKETS:
            return None
        if self.loss and random.random() < self.loss:
            return None
        sent = now
        if self.rate:
            sent = way.free_at = max(now, way.free_at) + length / self.rate
        due = sent + self.delay + (random.uniform(0, self.jitter) if self.jitter else 0.0)
        way.last_due = max(due, way.last_due)  # packets do not overtake each other
        return way.last_due

    def command(self, words: list[str]) -> None:
        """Does what a line of the standard input says."""
        match words:
            case ["delay" | "jitter" | "loss" | "rate" as name, value]:
                setattr(self, name, float(value))
            case ["cut" | "mend" as name]:
                self.is_cut = name == "cut"
            case ["reset"]:
                self.delay = self.jitter = self.loss = self.rate = 0.0
                self.is_cut = False
            case _:
                raise ValueError(f"a link knows no {' '.join(words)!r}")


class Network:
    """Carries packets between the devices, by their destination's address."""

    def __init__(self, ends: list[tuple[int, str]]) -> None:
        """`ends`: a host's TUN descriptor and its address."""
        self._tuns = [tun for tun, _ in ends]
        self._host_of = {socket.inet_aton(address): host for host, (_, address) in enumerate(ends)}
        self._links: dict[tuple[int, int], Link] = {}
        self._under_way: list[tuple[float, int, int, bytes, _Way]] = []
        self._sent = 0
        self._input = b""
        self._capture: BinaryIO | None = None

    def run(self) -> None:
        """Serve until standard input ends."""
        with selectors.DefaultSelector() as selector:
            for host, tun in enumerate(self._tuns):
                selector.register(tun, selectors.EVENT_READ, host)
            selector.register(0, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(self._time_to_next()):
                    if key.fd == 0:
                        data = os.read(0, 4096)
                        if not data:
                            return
                        self._take_commands(data)
                    else:
                        self._take_packets(key.data)
                self._deliver()

    def link(self, first: int, second: int) -> Link:
        """The link between two hosts."""
        return self._links.setdefault((min(first, second), max(first, second)), Link())

    def _time_to_next(self) -> float | None:
        if not self._under_way:
            return None
        return max(0.0, self._under_way[0][0] - time.monotonic())

    def _take_packets(self, host: int) -> None:
        while True:
            try:
                packet = os.read(self._tuns[host], _LONGEST_PACKET)
            except BlockingIOError:
                return
            other = self._host_of.get(packet[16:20])
            if packet[0] >> 4 != 4 or other is None or other == host:
                continue
            if self._capture is not None:
                self._write(packet)
            link = self.link(host, other)
            way = link.ways[host > other]
            due = link.due(way, len(packet), time.monotonic())
            if due is not None:
                way.waiting += 1
                self._sent += 1
                entry = (due, self._sent, self._tuns[other], packet, way)
                heapq.heappush(self._under_way, entry)

    def _deliver(self) -> None:
        while self._under_way and self._under_way[0][0] <= time.monotonic():
            _, _, tun, packet, way = heapq.heappop(self._under_way)
            way.waiting -= 1
            # Its queue is full or the device is down: lost, as on any network.
            with suppress(OSError):
                os.write(tun, packet)

    def _take_commands(self, data: bytes) -> None:
        *lines, self._input = (self._input + data).split(b"\n")
        for line in lines:
            words = line.decode().split()
            if words[0] == "capture":
                self._capture_to(words[1:])
            else:
                self.link(int(words[0]), int(words[1])).command(words[2:])
            print("done", flush=True)

    def _capture_to(self, path: list[str]) -> None:
        if self._capture is not None:
            self._capture.close()
        self._capture = None
        if path:
            self._capture = open(path[0], "wb", buffering=0)  # noqa: SIM115 - open until told
            self._capture.write(_PCAP_HEADER)

    def _write(self, packet: bytes) -> None:
        assert self._capture is not None
        now = time.time_ns() // 1000
        length = len(packet)
        head = struct.pack("<IIII", now // 1_000_000, now % 1_000_000, length, length)
        self._capture.write(head + packet)


def main() -> None:
    """Make the devices and carry packets."""
    # What waits for this process would look like a slow network.
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    ends = []
    for argument in sys.argv[1:]:
        namespace, device, address = argument.split(":")
        ends.append((open_tun(namespace, device), address))
    print("ready", flush=True)
    Network(ends).run()


if __name__ == "__main__":
    main()
