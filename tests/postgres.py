"""A real PostgreSQL with pgvector, for tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlencode

import psycopg

PASSWORD = "sesame-opens"
_STOP_SECONDS = 120.0
_START = "import pgserver, sys; pgserver.get_server(sys.argv[1], cleanup_mode=None)"


class PostgresServer:
    """A server of this test run's own, on a socket in its folder."""

    def __init__(self) -> None:
        # Not below pytest's folders: a server started by root runs as another user.
        self._folder = Path(tempfile.mkdtemp(prefix="miaotui-pg-"))
        self.start()
        with psycopg.connect(self.url(), autocommit=True) as connection:
            # The tests' data need not survive a loss of power.
            connection.execute("ALTER SYSTEM SET fsync = off")
            connection.execute("SELECT pg_reload_conf()")

    def url(self, database: str = "postgres") -> str:
        """With a password, which this server does not ask for, and nobody may tell."""
        query = urlencode({"host": str(self._folder)})
        return f"postgresql://postgres:{PASSWORD}@/{database}?{query}"

    def start(self) -> None:
        """Starts it, and returns when it serves."""
        # In a process of its own: pgserver forks, which gRPC's threads in this one do not bear.
        command = [sys.executable, "-W", "ignore", "-c", _START, str(self._folder)]
        for _ in range(6):  # pgserver gives its server ten seconds, which comes up all the same
            started = subprocess.run(command, capture_output=True, text=True, check=False)
            if started.returncode == 0:
                return
            time.sleep(1)
        raise AssertionError(started.stderr)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Ends it as its operator would, at once and in order; the data stay."""
        file = self._folder / "postmaster.pid"
        os.kill(int(file.read_text().split()[0]), how)
        deadline = time.monotonic() + _STOP_SECONDS
        while file.exists():
            assert time.monotonic() < deadline, "PostgreSQL does not stop"
            time.sleep(0.02)

    def close(self) -> None:
        """Ends it and removes its data."""
        self.stop(signal.SIGQUIT)  # without writing what is removed at once
        shutil.rmtree(self._folder, ignore_errors=True)

    def make(self, database: str) -> str:
        """A new database's URL."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}"')
        return self.url(database)
