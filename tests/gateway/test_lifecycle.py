"""Start, stop, services that restart, and settings that are not valid."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from gateway.settings import GatewaySettings
from tests.gateway.conftest import run_gateway, until
from tests.gateway.fakes import Fakes, running_fakes
from tests.processes import ServiceProcess


async def test_stop_finishes_what_runs_and_takes_nothing_new(
    all_fakes: Fakes, tmp_path: Path
) -> None:
    all_fakes.reset()
    async with run_gateway(all_fakes, tmp_path) as gateway:
        gate = all_fakes.shard.faults.hold()
        running = asyncio.create_task(gateway.ask("slow stop", "In 1950."))
        await until(lambda: all_fakes.shard.faults.running == 1)
        gateway.process.process.terminate()
        with pytest.raises(httpx.TransportError):
            while not running.done():
                async with httpx.AsyncClient(trust_env=False) as other:
                    await other.get(f"{gateway.url}/healthz")
                await asyncio.sleep(0.02)
        gate.set()
        response = await running
        assert response.json()["answers"][0]["text"] == "1950"
        assert await asyncio.to_thread(gateway.process.wait) == 0
        assert "Traceback" not in gateway.process.log


async def test_a_service_that_restarts_with_another_model(tmp_path: Path) -> None:
    async with (
        running_fakes() as fakes,
        run_gateway(fakes, tmp_path, POLL_SECONDS="60", MAX_CONCURRENT_REQUESTS="3") as gateway,
    ):
        assert (await gateway.ask("q", "In 1951.")).json()["cache"] == "miss"
        assert (await gateway.ask("q", "In 1951.")).json()["cache"] == "hit"
        address = fakes.address("shard")
        await fakes.servers["shard"].stop(0)
        response = await gateway.ready(False)
        assert response.json()["type"] == "/problems/unavailable"
        body = {"question": "q", "context": "In 1951."}
        for _ in range(4):
            began = time.monotonic()
            refused = await gateway.http.post(
                "/v1/qa", json=body, headers={"X-Request-Timeout": "1"}
            )
            assert time.monotonic() - began > 0.5, "it waits"
            if refused.status_code == 503:  # on a busy machine it may be late once: a 504
                break
        assert refused.status_code == 503, "it tells in time that it waited in vain"
        assert "retry-after" in refused.headers
        # As many as may be worked on wait; one more is told so at once.
        waiting = [asyncio.create_task(gateway.ask("q", "In 1951.")) for _ in range(3)]
        await gateway.until_asked(3)
        crowded = await gateway.ask("q", "In 1951.")
        assert crowded.json()["type"] == "/problems/overloaded"
        assert not any(one.done() for one in waiting)
        fakes.shard.fingerprint = fakes.tokenizer.fingerprint = "model-2"
        await fakes.start("shard", address)
        for answer in [(await one).json() for one in waiting]:
            assert answer["cache"] in ("miss", "shared", "hit")
            assert answer["model_fingerprint"] == "model-2"
        await gateway.ready()
        # Services that do not fit each other will not by waiting.
        fakes.tokenizer.fingerprint = "model-3"
        await fakes.servers["tokenizer"].stop(0)
        await fakes.start("tokenizer", fakes.address("tokenizer"))
        misfit = await gateway.ready(False)
        while "fingerprints differ" not in misfit.json()["detail"]:
            await asyncio.sleep(0.05)
            misfit = await gateway.ready(False)
        began = time.monotonic()
        misfit = await gateway.http.post("/v1/qa", json=body, headers={"X-Request-Timeout": "60"})
        assert misfit.status_code == 503
        assert time.monotonic() - began < 30


async def test_an_address_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        process = ServiceProcess(
            "gateway",
            [sys.executable, "-m", "gateway"],
            {"MIAOTUI_GATEWAY_HTTP_LISTEN": listen, "MIAOTUI_GATEWAY_GRPC_LISTEN": "127.0.0.1:0"},
            tmp_path / "log",
        )
        process.start()
        assert await asyncio.to_thread(process.wait) == 2
        assert f"cannot listen on {listen}" in process.log
        assert "Traceback" not in process.log
        process.stop()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_LISTEN", "nowhere"),
        ("GRPC_LISTEN", "a:70000"),
        ("REQUEST_TIMEOUT", "0"),
        ("REQUEST_TIMEOUT", "61"),
        ("MAX_BODY_BYTES", "-1"),
        ("CACHE_SECRET", ""),
        ("LOG_LEVEL", "loud"),
    ],
)
def test_settings_that_are_not_valid(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"MIAOTUI_GATEWAY_{name}", value)
    with pytest.raises(ValidationError):
        GatewaySettings()


def test_redis_url_by_its_plain_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://plain")
    settings = GatewaySettings()
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == "redis://plain"
    assert "plain" not in repr(settings)
    monkeypatch.setenv("MIAOTUI_GATEWAY_REDIS_URL", "redis://own")
    assert GatewaySettings().redis_url.get_secret_value() == "redis://own"  # type: ignore[union-attr]


def test_secrets_are_random_unless_set() -> None:
    first, second = GatewaySettings(), GatewaySettings()
    assert first.cache_secret.get_secret_value() != second.cache_secret.get_secret_value()
