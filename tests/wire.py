"""A cable between two network namespaces that delays, loses or stops packets.

`python -m tests.wire NAMESPACE:DEVICE NAMESPACE:DEVICE` makes a TUN device in each and carries
IP packets between them in user space, so that it needs no kernel module (netem is missing from
many kernels). Prints "ready"; then takes lines on its standard input: `delay SECONDS` (each
way), `loss SHARE`, `cut`, `mend`. Ends when its input does. Needs root.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import selectors
import struct
import sys
import time
from collections import deque

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_LONGEST_PACKET = 65_536


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


class Wire:
    """Carries packets both ways. The delay is added to every packet; order is kept."""

    def __init__(self, left: int, right: int) -> None:
        self.delay = 0.0
        self.loss = 0.0
        self.cut = False
        self._other = {left: right, right: left}
        self._under_way: deque[tuple[float, int, bytes]] = deque()

    def run(self) -> None:
        """Serve until standard input ends."""
        with selectors.DefaultSelector() as selector:
            for tun in self._other:
                selector.register(tun, selectors.EVENT_READ)
            selector.register(0, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(self._time_to_next()):
                    if key.fd == 0:
                        if not self._command(os.read(0, 4096).decode()):
                            return
                    else:
                        self._take(key.fd)
                self._deliver()

    def _time_to_next(self) -> float | None:
        if not self._under_way:
            return None
        return max(0.0, self._under_way[0][0] - time.monotonic())

    def _take(self, tun: int) -> None:
        while True:
            try:
                packet = os.read(tun, _LONGEST_PACKET)
            except BlockingIOError:
                return
            if self.cut or (self.loss and random.random() < self.loss):
                continue
            due = time.monotonic() + self.delay
            if self._under_way:  # after a shorter delay was set
                due = max(due, self._under_way[-1][0])
            self._under_way.append((due, self._other[tun], packet))

    def _deliver(self) -> None:
        while self._under_way and self._under_way[0][0] <= time.monotonic():
            _, tun, packet = self._under_way.popleft()
            try:
                os.write(tun, packet)
            except OSError:
                continue  # its queue is full or the device is down: lost, as on any cable

    def _command(self, text: str) -> bool:
        for line in text.splitlines():
            words = line.split()
            if words[0] == "delay":
                self.delay = float(words[1])
            elif words[0] == "loss":
                self.loss = float(words[1])
            else:
                self.cut = words[0] == "cut"
        return bool(text)


def main() -> None:
    """Make the devices and carry packets."""
    ends = [argument.partition(":") for argument in sys.argv[1:3]]
    left, right = (open_tun(namespace, device) for namespace, _, device in ends)
    print("ready", flush=True)
    Wire(left, right).run()


if __name__ == "__main__":
    main()
