"""API keys: what is kept of them, the file, and the commands."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from gateway.access.control import key_of
from gateway.access.http import guarded, scope_of
from gateway.access.keys import ApiKey, Limits, Rate, make_key, matches, split_key
from gateway.access.limiter import LocalLimiter
from gateway.access.store import KeyFile, KeyFileError, Keyring, read_keys
from gateway.desk import Desk
from gateway.http.app import HttpApi
from gateway.live.api import LiveFigures
from gateway.live.counters import LiveCounters
from gateway.live.traces import TraceRing
from gateway.models import Models
from gateway.settings import GatewaySettings
from miaotui.cli.app import app


def test_a_key_is_its_own_and_only_a_hash_of_it_is_kept() -> None:
    key, text = make_key("alice")
    parts = split_key(text)
    assert parts is not None
    assert parts[0] == key.id == key.tenant
    assert matches(key, *parts)
    assert parts[1] not in key.model_dump_json()
    other, _ = make_key("alice")
    assert not matches(other, *parts)
    assert not matches(None, *parts)


@given(st.text(max_size=100))
def test_what_is_no_key_is_refused(text: str) -> None:
    assert split_key(text) is None


@given(st.data())
def test_a_key_that_was_changed_anywhere_is_another(data: st.DataObject) -> None:
    key, text = make_key("alice")
    place = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.sampled_from("0123456789abcdefGHxyz_-"))
    changed = text[:place] + letter + text[place + 1 :]
    parts = split_key(changed)
    if changed != text and parts is not None:
        assert parts[0] != key.id or not matches(key, *parts)


def test_where_a_key_is_looked_for() -> None:
    assert key_of("Bearer mt_1", None) == "mt_1"
    assert key_of("bearer  mt_1 ", "other") == "mt_1"
    assert key_of("Basic dXNlcg==", "mt_2") == "mt_2"
    assert key_of("Basic dXNlcg==", None) is None
    assert key_of(None, None) is None


def test_the_file_is_private_whole_and_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keys.json"
    file = KeyFile(path)
    assert file.keys() == []
    first, first_text = make_key("first")
    file.add(first)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ring = Keyring(path)
    ring_looks(ring)
    assert ring.find(first_text) == first
    second, second_text = make_key("二号", limits=Limits(rate=Rate(count=3, seconds=1)))
    os.chmod(path, 0o640)
    file.add(second)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640  # the operator's choice stays
    ring_looks(ring)
    assert ring.find(second_text) == second
    assert file.revoke(first.id) is not None
    assert file.revoke("0" * 12) is None
    ring_looks(ring)
    assert ring.find(first_text) is None
    assert ring.find(second_text) == second
    assert os.listdir(path.parent) == ["keys.json"]


def ring_looks(ring: Keyring) -> None:
    """Lets a keyring look at its file at its next call, as a second would."""
    ring._next_look = 0.0


def test_a_broken_file_changes_nothing_and_a_bad_one_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"
    with pytest.raises(KeyFileError, match="miaotui keys create"):
        Keyring(path)
    key, text = make_key("alice")
    KeyFile(path).add(key)
    ring = Keyring(path)
    path.write_text('{"version": 1, "keys": [{"id": "secret-value"}]}')
    ring_looks(ring)
    assert ring.find(text) == key
    assert "stay as they were" in caplog.text
    assert "secret-value" not in caplog.text
    assert caplog.text.count("stay as they were") == 1
    path.unlink()
    ring_looks(ring)
    assert ring.find(text) == key
    with pytest.raises(KeyFileError, match="no file of API keys"):
        path.write_text("{")
        read_keys(path)
    path.write_text("{}")
    os.chmod(path, 0o666)
    with pytest.raises(KeyFileError, match="chmod 600"):
        read_keys(path)


async def test_two_at_once_lose_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    made = [make_key(f"key {n}")[0] for n in range(40)]
    await asyncio.gather(*(asyncio.to_thread(KeyFile(path).add, key) for key in made))
    assert {key.id for key in read_keys(path)} == {key.id for key in made}


def test_every_route_of_the_api_needs_a_key_and_the_rest_is_known() -> None:
    settings = GatewaySettings()
    models = Models(settings)
    live = LiveFigures(settings, models, LiveCounters(), TraceRing(0))
    routes = HttpApi(settings, models, Desk(settings, None, None), live).routes()
    opened = {route.path for route in routes if not guarded(route.path)}
    assert opened == {
        *("/", "/docs", "/web/{name:path}"),
        *("/healthz", "/readyz", "/problems/{slug}", "/openapi.json"),
    }
    assert not guarded("/metrics", open_metrics=True)
    assert scope_of("POST", "/v1/chat/completions") == "write"
    assert scope_of("POST", "/v1/qa/batch") == scope_of("GET", "/v1/documents/7") == "ask"
    assert scope_of("DELETE", "/v1/documents/7") == scope_of("POST", "/v1/documents") == "documents"
    assert scope_of("GET", "/v1/traces/7") == scope_of("GET", "/metrics") == "observe"
    assert scope_of("GET", "/v1/models") is None
    assert scope_of("POST", "/v1/something-new") == "ask"


def test_the_commands_make_list_rotate_and_revoke(tmp_path: Path) -> None:
    run, path = CliRunner(), str(tmp_path / "keys.json")
    arguments = ["--rate", "600/minute", "--quota", "1000/day", "--tokens", "5000"]
    more = ["--concurrency", "2", "--scopes", "write,ask"]
    created = run.invoke(app, ["keys", "create", "小王", *arguments, *more, "--keys", path])
    assert created.exit_code == 0, created.output
    text = created.stdout.strip().splitlines()[-1]
    (key,) = read_keys(Path(path))
    assert split_key(text) is not None
    assert Keyring(Path(path)).find(text) == key
    assert key.scopes == ("ask", "write")
    assert key.limits == Limits(
        rate=Rate(count=600, seconds=60),
        requests_per_day=1000,
        tokens_per_day=5000,
        concurrency=2,
    )
    rotated = json.loads(
        run.invoke(app, ["keys", "rotate", key.id, "--keys", path, "--json"]).stdout
    )
    assert (rotated["name"], rotated["tenant"]) == ("小王", key.tenant)
    assert run.invoke(app, ["keys", "revoke", key.id, "--keys", path]).exit_code == 0
    listed = run.invoke(app, ["keys", "list", "--keys", path, "--json"]).stdout
    assert [bool(one["revoked"]) for one in json.loads(listed)] == [True, False]
    assert "sha256" not in listed
    assert Keyring(Path(path)).find(text) is None
    assert Keyring(Path(path)).find(rotated["key"]) is not None
    table = run.invoke(app, ["keys", "list", "--keys", path])
    assert rotated["id"] in table.stdout


@pytest.mark.parametrize(
    "wrong",
    [
        ["create", "x", "--rate", "10"],
        ["create", "x", "--rate", "0/s"],
        ["create", "x", "--rate", "5/fortnight"],
        ["create", "x", "--quota", "5/s"],
        ["create", "x", "--scopes", "root"],
        ["create", "x", "--scopes", ""],
        ["create", "x", "--tenant", "../other"],
        ["create", ""],
        ["revoke", "0" * 12],
        ["rotate", "0" * 12],
    ],
    ids=" ".join,
)
def test_commands_refuse_what_makes_no_sense(tmp_path: Path, wrong: list[str]) -> None:
    result = CliRunner().invoke(app, ["keys", *wrong, "--keys", str(tmp_path / "keys.json")])
    assert result.exit_code == 2
    assert result.output.strip()
    assert not read_any(tmp_path / "keys.json")


def read_any(path: Path) -> list[ApiKey]:
    return read_keys(path) if path.exists() else []


def test_a_check_costs_microseconds(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    file = KeyFile(path)
    file.add(make_key("other")[0])
    key, text = make_key("k", limits=Limits(rate=Rate(count=10**9, seconds=1), concurrency=9))
    file.add(key)
    ring, limiter = Keyring(path), LocalLimiter()
    best = 1.0
    for _ in range(20):
        began = time.process_time()
        for _ in range(200):
            found = ring.find(key_of(f"Bearer {text}", None) or "")
            assert found is not None
            limiter.admit(found, True)
            limiter.leave(found, b"")
        best = min(best, (time.process_time() - began) / 200)
    # It takes about 5 µs; a sleeping laptop or a traced run is allowed ten times that.
    assert best < 50e-6
