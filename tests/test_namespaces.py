"""The cables between namespaces do what later tests rely on."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.namespaces import Hosts, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

ECHO = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.bind((sys.argv[1], 9000))
    print("ready", flush=True)
    while True:
        s.sendto(*s.recvfrom(99))
"""
ASK = """
import socket, sys, time
for number in range(3):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(0.4)
        began = time.monotonic()
        s.sendto(b"%d" % number, (sys.argv[1], 9000))
        try:
            s.recv(99)
            print(time.monotonic() - began)
        except TimeoutError:
            pass
"""


def round_trips(hosts: Hosts) -> list[float]:
    """Seconds of the datagrams, of three, that came back from host 1 to host 0."""
    argv = [sys.executable, "-c", ASK, hosts.inside(1, seen_from=0)]
    done = subprocess.run(hosts.command(0, argv), capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def test_a_cable_delays_cuts_and_mends() -> None:
    """A round trip takes twice the delay; nothing passes a cable that is cut."""
    with Hosts(2) as hosts:
        argv = [sys.executable, "-c", ECHO, hosts.inside(1, seen_from=0)]
        echo = subprocess.Popen(hosts.command(1, argv), stdout=subprocess.PIPE, text=True)
        try:
            assert echo.stdout is not None
            assert echo.stdout.readline() == "ready\n"
            plain = round_trips(hosts)
            assert len(plain) == 3
            assert min(plain) < 0.02
            hosts.delay(0, 0.05)
            slow = round_trips(hosts)
            assert len(slow) == 3
            assert 0.1 <= min(slow) < 0.15
            hosts.cut(0)
            assert round_trips(hosts) == []
            hosts.mend(0)
            assert len(round_trips(hosts)) == 3
            hosts.loss(0, 1.0)
            assert round_trips(hosts) == []
        finally:
            echo.kill()
            echo.communicate()
