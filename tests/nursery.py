"""Starts services by forking a process that has imported already what all of them import.

Importing torch and transformers takes a service seconds of a core, and tests start some two
hundred services. What is forked runs the same `python -m MODULE` as any: its own process, its
own environment, sockets and log. `MIAOTUI_TEST_FORK=0` starts them the plain way instead.

Run as a program this is the nursery itself: it reads one JSON object a line from its standard
input (module, env, log) and answers with one a line ({"pid": …} to each, {"ended": pid, "code":
…} when one ends).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

MODULES = ("services.tokenizer", "services.shard", "gateway")
_IMPORTED = (
    "gateway.main",
    "services.shard.server",
    "services.tokenizer.server",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
)
_ROOT = Path(__file__).parent.parent


class Forked:
    """A forked service; what tests use of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._over = threading.Event()

    def ended(self, code: int) -> None:
        """Takes the exit code."""
        self.returncode = code
        self._over.set()

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises `subprocess.TimeoutExpired`."""
        if not self._over.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal; nothing happens once it has ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):  # its end may not have been told yet
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The nursery's client; one for all tests of a run."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.nursery", str(os.getpid())],
            env={**env, "OPENBLAS_NUM_THREADS": "1"},
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        self._born: list[Forked] = []
        self._late = 0
        """Births that nobody waits for any more."""
        self._children: dict[int, Forked] = {}
        self._news = threading.Condition()
        self._lock = threading.Lock()
        threading.Thread(target=self._read, name="nursery", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it can start more."""
        return self._process.poll() is None

    def start(self, module: str, env: Mapping[str, str], log: Path) -> Forked:
        """Starts `python -m module` with this environment; its output goes to the end of `log`."""
        request = {"module": module, "env": dict(env), "log": str(log)}
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            with self._news:
                self._news.wait_for(lambda: self._born or not self.alive, timeout=240)
                if not self._born:
                    self._late += 1  # when it comes it must not be taken for the next one
                    raise AssertionError("the nursery does not start anything")
                return self._born.pop()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            news: dict[str, Any] = json.loads(line)
            with self._news:
                if "pid" in news:
                    child = self._children[news["pid"]] = Forked(news["pid"])
                    if self._late:
                        self._late -= 1
                        child.kill()
                    else:
                        self._born.append(child)
                else:
                    self._children.pop(news["ended"]).ended(news["code"])
                self._news.notify_all()
        with self._news:
            self._news.notify_all()  # it is gone


def _serve() -> dict[str, Any] | None:
    """Forks what is asked for. Returns in a child, with its request; None: nobody asks more."""
    wake, woken = os.pipe()[::-1]
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    rest = b""
    while True:
        ready = [key.fd for key, _ in selector.select()]
        if woken in ready:
            os.read(woken, 4096)
            _reap()
        if 0 not in ready:
            continue
        chunk = os.read(0, 1 << 16)
        if not chunk:
            return None
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            parent, pid = os.getpid(), os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                selector.close()
                os.close(wake)
                os.close(woken)
                request: dict[str, Any] = json.loads(line)
                _become(request, parent)
                return request
            _say({"pid": pid})


def _reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _say({"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def _say(news: Mapping[str, int]) -> None:
    os.write(1, json.dumps(news).encode() + b"\n")


def _become(request: Mapping[str, Any], parent: int) -> None:
    from miaotui.cli.child import die_with_parent

    os.setsid()
    die_with_parent(parent)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(nothing)
    os.environ.clear()
    os.environ.update(request["env"])


def main() -> None:
    """Imports what services import, then forks them until its input ends."""
    from miaotui.cli.child import die_with_parent
    from miaotui.engine import threads

    die_with_parent(int(sys.argv[1]))
    threads.configure_threads()  # before torch is imported

    for module in _IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # collections in a child need not copy the pages of what never goes
    # A fork has this thread only: whatever has started others would be broken in it.
    assert threading.active_count() == 1
    request = _serve()
    if request is None:
        return
    # Done before, and refused once torch and numpy are there.
    threads.configure_threads = threads.leave_other_cores = lambda: None
    sys.argv = [request["module"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
