"""`miaotui up` and the other commands, as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from typer.testing import CliRunner, Result

from miaotui.cli.app import app
from tests.e2e.conftest import Checkpoints
from tests.processes import ServiceProcess, clean_environment, free_port, processes_with

MIAOTUI = [sys.executable, "-m", "miaotui.cli"]
PASSAGE = "The Palace Museum in Beijing was founded in 1925 and holds 1.8 million objects."


class Up(ServiceProcess):
    """A running `miaotui up`; every process of it bears a mark in its environment."""

    def __init__(self, model: Path, log: Path, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        self.http_port, self.grpc_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.http_port}"
        argv = [*MIAOTUI, "up", "--model", str(model), "--http-port", str(self.http_port)]
        argv += ["--grpc-port", str(self.grpc_port), "--tokenizer-port", "0", "--shard-port", "0"]
        argv += ["--encoder-stages", "0"]
        super().__init__("up", [*argv, *arguments], {"MIAOTUI_TEST": self.mark}, log)

    def wait_for(self, text: str, timeout: float = 120.0) -> None:
        """Waits until it has printed `text`; fails at once where it ends."""
        deadline = time.monotonic() + timeout
        while text not in self.log:
            assert self.alive, self.tail(80)
            assert time.monotonic() < deadline, f"never said {text!r}\n{self.tail(80)}"
            time.sleep(0.05)

    def assert_nothing_left(self) -> None:
        """Fails where a process of it stays."""
        deadline = time.monotonic() + 30
        while left := processes_with(self.mark):
            assert time.monotonic() < deadline, f"left: {[p.cmdline() for p in left]}"
            time.sleep(0.05)

    def pid_of(self, service: str, *, stage: int = 0) -> int:
        """The process of a service."""
        found = [
            process
            for process in processes_with(self.mark)
            if process.cmdline()[-1] == service
            and process.environ().get("MIAOTUI_SHARD_STAGE", str(stage)) == str(stage)
        ]
        assert len(found) == 1, f"{len(found)} processes of {service}"
        return found[0].pid


@contextmanager
def running(up: Up) -> Iterator[Up]:
    """Starts it, waits until it is ready, and ends it."""
    up.start()
    try:
        up.wait_for("Ctrl-C stops everything")
        yield up
    finally:
        up.stop()


def _run(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MIAOTUI, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env={**clean_environment(), "COLUMNS": "120", **environment},
    )


def _here(*arguments: str) -> Result:
    """`miaotui` in this process, which is quicker."""
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "120"}, prog_name="miaotui")


def test_once_answers_and_leaves_nothing(checkpoint: Checkpoints, tmp_path: Path) -> None:
    passage = tmp_path / "passage.txt"
    passage.write_text(PASSAGE, "utf-8")
    question = ["--ask", "When was it founded?", "--context-file", str(passage)]
    up = Up(checkpoint("bert"), tmp_path / "log", "--once", *question)
    up.start()
    try:
        assert up.wait(180) == 0, up.tail(80)
    finally:
        up.stop()
    assert "When was it founded?" in up.log
    assert "stage 1" in up.log
    assert "all services have stopped" in up.log
    up.assert_nothing_left()


def test_a_user_session(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Asks in every way, kills a stage, and ends it with Ctrl-C."""
    with running(Up(checkpoint("bert"), tmp_path / "log", "--encoder-stages", "1")) as up:
        for name in ("tokenizer", "shard-0", "shard-1", "gateway"):
            assert f"{name} is ready" in up.log
        asked = ["ask", "When was it founded?", "--json"]
        over_http = _run(*asked, "--context", PASSAGE, "--url", up.url)
        over_grpc = _run(*asked, "--grpc", f"127.0.0.1:{up.grpc_port}", stdin=PASSAGE)
        assert over_http.returncode == over_grpc.returncode == 0, (
            over_http.stderr + over_grpc.stderr
        )
        first, second = json.loads(over_http.stdout), json.loads(over_grpc.stdout)
        assert first["answers"][0]["text"] == second["answers"][0]["text"]
        assert first["answers"][0]["text"] in PASSAGE
        assert (first["cache"], second["cache"]) == ("miss", "hit")

        pretty = _here("ask", "When?", "--context", PASSAGE, "--url", up.url, "--top-k", "3")
        assert pretty.exit_code == 0
        for part in ("Q When?", "A ", "score", "tokenizer", "stage 0", "stage 1", "cache miss"):
            assert part in pretty.stdout
        models = _here("models", "--url", up.url)
        assert "bert" in models.stdout
        assert "ready" in models.stdout
        status = _here("status", "--url", up.url)
        assert "layers" in status.stdout
        assert status.exit_code == 0

        refused = _here("ask", " ", "--context", PASSAGE, "--url", up.url)
        assert refused.exit_code == 1
        assert "/question: must not be empty or blank" in refused.stderr

        up.wait_for("encoder-0 is ready")
        up.wait_for("embedding model: serving all-MiniLM-L6-v2")

        os.kill(up.pid_of("services.shard", stage=1), signal.SIGKILL)
        up.wait_for("shard-1 is ready again")
        again = _here(*asked, "--context", f"{PASSAGE} It is large.", "--url", up.url)
        assert again.exit_code == 0, again.stderr
        assert "shard-1 was ended by SIGKILL; restarted in 0.5 s" in up.log

        up.signal(signal.SIGINT)
        assert up.wait(60) == 0, up.tail(80)
        up.assert_nothing_left()
        assert "Traceback" not in up.log
        assert "killed" not in up.log
        order = [
            up.log.index(f"{name} │ ", up.log.index("│ stopping"))
            for name in ("gateway", "tokenizer")
        ]
        assert order == sorted(order), "the gateway stops first, the tokenizer last"


def test_no_orphan_when_up_itself_is_killed(checkpoint: Checkpoints, tmp_path: Path) -> None:
    up = Up(checkpoint("bert"), tmp_path / "log", "--stages", "1")
    up.start()
    try:
        up.wait_for("HTTP on")
        assert len(processes_with(up.mark)) == 4
        up.kill()
        up.assert_nothing_left()
    finally:
        up.stop()


def test_a_port_in_use_is_named(checkpoint: Checkpoints) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = _run("up", "--model", str(checkpoint("bert")), "--http-port", str(port))
    assert done.returncode == 2
    assert f"port {port} on 127.0.0.1 is in use" in done.stderr
    assert "--http-port" in done.stderr
    assert str(os.getpid()) in done.stderr, "it says who holds the port"


def test_a_wrong_configuration_stops_everything_at_once(checkpoint: Checkpoints) -> None:
    ports = ["--http-port", "0", "--grpc-port", "0", "--tokenizer-port", "0", "--shard-port", "0"]
    done = _run("up", "--model", str(checkpoint("bert")), *ports, "--stages", "4")
    assert done.returncode == 1, done.stdout
    assert "not configured correctly" in done.stdout
    message = "4 stages asked for; a model of 3 layers splits into 1 to 3"
    assert message in " ".join(done.stdout.split())
    assert "restarted" not in done.stdout
