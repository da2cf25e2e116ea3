"""TCP ports of this machine: which are free, and who holds the others."""

from __future__ import annotations

import socket


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a service could listen on the port now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def holder(port: int) -> str:
    """ "name (pid 123)" of the process that listens on the port; empty where it is unknown."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            address = connection.laddr
            if connection.status == psutil.CONN_LISTEN and address and address.port == port:
                if connection.pid is None:
                    return ""
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except (psutil.Error, OSError):
        return ""  # macOS wants root for this; the message is then less exact
    return ""


def find_free(host: str, start: int, taken: set[int]) -> int:
    """The first free port from `start` on that is not in `taken`.

    Raises `OSError` where none of the next 200 is free.
    """
    for port in range(start, min(start + 200, 65536)):
        if port not in taken and is_free(port, host):
            return port
    raise OSError(f"no free port on {host} from {start} to {start + 199}")
