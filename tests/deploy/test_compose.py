"""The Compose files: valid, and true to the services that they start."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from pydantic_settings import BaseSettings

from gateway.settings import GatewaySettings
from miaotui.cli.serve import variable
from services.shard.settings import ShardSettings
from services.tokenizer.settings import TokenizerSettings
from tests.deploy.compose import (
    BASE,
    BESIDE,
    OVERRIDES,
    ROOT,
    interpolate,
    load,
    read_yaml,
    variant,
)
from tests.deploy.conftest import Stacks
from tests.deploy.stack import SERVICES
from tests.e2e.collector import Collector, Span

SCHEMA = Path(__file__).parent / "schemas" / "compose-spec.json"
SETTINGS: dict[str, type[BaseSettings]] = {
    "gateway": GatewaySettings,
    "tokenizer": TokenizerSettings,
    "shard": ShardSettings,
}
# Read by OpenTelemetry itself.
OPEN_TELEMETRY = {"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_METRICS_EXPORTER"}
# Images without a shell or any other program to check with; nothing waits for their health.
UNCHECKED = {"collector", "jaeger"}
# The image's entrypoint reads these from files.
SECRETS = (
    *("REDIS_URL", "MIAOTUI_GATEWAY_CACHE_SECRET"),
    "MIAOTUI_GATEWAY_CACHE_ENCRYPTION_KEY",
)
EVERYTHING = variant(*BESIDE)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    **{name: variant(name) for name in BESIDE},
    "everything": EVERYTHING,
    "tls": {**EVERYTHING, "overrides": ("tls",)},
    "cuda": {**EVERYTHING, "overrides": ("cuda",)},
    "keys": {**EVERYTHING, "overrides": ("tls", "keys")},
}


@pytest.fixture(params=VARIANTS)
def project(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each way to start it."""
    given = dict(VARIANTS[request.param])
    return load(*given.pop("overrides", ()), **given)


def ours(project: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], type[BaseSettings]]]:
    """The services of this repository, and the settings that they read."""
    for name, service in project["services"].items():
        command = service.get("command") or [""]
        if command[0] == "serve":
            yield name, service, SETTINGS[command[1]]


def settings_in(environment: dict[str, str], prefix: str) -> dict[str, str]:
    """What a service reads of its environment, by the names of its settings."""
    return {
        key.removeprefix(prefix).lower(): value
        for key, value in environment.items()
        if key.startswith(prefix)
    }


@pytest.mark.parametrize("path", [BASE, *OVERRIDES.values()], ids=lambda path: path.name)
def test_files_follow_the_specification(path: Path) -> None:
    validator = Draft202012Validator(json.loads(SCHEMA.read_text("utf-8")))
    (document,) = read_yaml(path.read_text("utf-8"))
    errors = [f"{e.json_path}: {e.message}" for e in validator.iter_errors(document)]
    assert not errors, "\n".join(errors)


def test_variables_are_settings(project: dict[str, Any]) -> None:
    found = list(ours(project))
    assert len(found) >= 4
    for name, service, settings in found:
        known = {variable(settings, field) for field in settings.model_fields}
        known |= {"REDIS_URL"} if settings is GatewaySettings else set()
        known |= OPEN_TELEMETRY
        known |= {f"{secret}_FILE" for secret in SECRETS}
        assert set(service["environment"]) <= known, name


def test_addresses_lead_somewhere(project: dict[str, Any]) -> None:
    """Every host:port in a setting is one where that service listens, on a network of both."""
    listening = {
        (name, value.rpartition(":")[2])
        for name, service, _ in ours(project)
        for key, value in service["environment"].items()
        if key.endswith("LISTEN")
    }
    checked = 0
    for name, service, _ in ours(project):
        for key, value in service["environment"].items():
            if not key.endswith(("_TOKENIZER", "_SHARD", "_STAGES")) or "COLOCATED" in key:
                continue
            for address in value.split(","):
                if not address:
                    continue
                host, _, port = address.rpartition(":")
                assert (host, port) in listening, f"{name}: {key}"
                shared = set(service["networks"]) & set(project["services"][host]["networks"])
                assert shared, f"{name} and {host} share no network"
                checked += 1
    assert checked >= 6


def test_stages_can_be_scaled(project: dict[str, Any]) -> None:
    """Containers of one service can be told apart, and nothing keeps them from being several."""
    checked = 0
    for name, service, settings in ours(project):
        if settings is not ShardSettings:
            continue
        assert not {"container_name", "hostname", "ports"} & set(service), name
        assert "replicas" not in service["deploy"], name
        given = ShardSettings.model_validate(settings_in(service["environment"], "MIAOTUI_SHARD_"))
        assert given.addresses[given.stage] == f"{name}:50060"
        # A stage 0 that had its service's name would get another one's results.
        assert given.address == f"{socket.gethostname()}:50060", name
        assert given.listen.endswith(":50060"), name
        checked += 1
    assert checked >= 2
    for model in BESIDE:
        given_variant = variant(model)
        own = "KV_SHARES" if model == "generator" else f"{model.upper()}_KV_SHARES"
        given_variant["environment"][own] = "2"
        services = load(**given_variant)["services"]
        shares = {
            services[f"{model}-{stage}"]["environment"]["MIAOTUI_SHARD_KV_SHARES"]
            for stage in (0, 1)
        }
        assert shares == {"2"}, model


def test_only_the_gateway_and_grafana_are_published_on_loopback(project: dict[str, Any]) -> None:
    published = {name: s["ports"] for name, s in project["services"].items() if "ports" in s}
    assert set(published) == {"gateway", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    inside = {name for name, net in project["networks"].items() if (net or {}).get("internal")}
    for name, service in project["services"].items():
        if name not in published and "networks" in service:
            assert set(service["networks"]) <= inside, f"{name} reaches the outside"


def test_everything_is_bounded_checked_and_restarted(project: dict[str, Any]) -> None:
    for name, service in project["services"].items():
        assert "memory" in service["deploy"]["resources"]["limits"], name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        image = service["image"]
        assert re.fullmatch(r"miaotui:\w+|[\w./-]+:v?\d+\.\d+[\w.-]*", image), name
        once = name.startswith("make-")
        if once:
            assert service["network_mode"] == "none", name
        else:
            assert service["restart"] == "unless-stopped", name
            assert ("healthcheck" in service) is (name not in UNCHECKED), name


def test_nothing_starts_before_what_it_needs(project: dict[str, Any]) -> None:
    services = project["services"]
    assert {"redis", "tokenizer", "shard-0", "shard-1"} <= set(services["gateway"]["depends_on"])
    for name, service in services.items():
        for other, condition in service.get("depends_on", {}).items():
            assert other in services, f"{name} waits for {other}, which is of another profile"
            wanted = "service_healthy"
            if other.startswith("make-"):
                wanted = "service_completed_successfully"
            elif other in UNCHECKED:
                wanted = "service_started"
            assert condition == {"condition": wanted}, f"{name} → {other}"


def test_mounts_exist(project: dict[str, Any]) -> None:
    for name, service in project["services"].items():
        for mount in service.get("volumes", []):
            if isinstance(mount, dict):
                assert mount["bind"]["create_host_path"] is False, name
                continue
            source, _, target = mount.partition(":")
            if source.startswith("./"):
                assert (ROOT / source).exists(), f"{name}: {source}"
                assert target.endswith(":ro"), f"{name}: {source}"
            else:
                assert source in project["volumes"], f"{name}: {source}"
        assert set(service.get("networks", [])) <= set(project["networks"]), name


@pytest.mark.parametrize("model", BESIDE)
def test_a_model_is_known_to_the_gateway_only_where_it_runs(model: str) -> None:
    for given, there in (({}, False), (variant(model), True), (EVERYTHING, True)):
        project = load(**given)
        environment = project["services"]["gateway"]["environment"]
        GatewaySettings.model_validate(settings_in(environment, "MIAOTUI_GATEWAY_"))
        for name in ("TOKENIZER", "SHARD"):
            address = environment[f"MIAOTUI_GATEWAY_{model.upper()}_{name}"]
            assert bool(address) is there
            assert (address.partition(":")[0] in project["services"]) is there


def test_the_variants_differ_in_what_they_start() -> None:
    started = {name: set(load(**variant(name))["services"]) for name in BESIDE}
    plain = set(load()["services"])
    for name, services in started.items():
        assert services - plain == {f"{name}-{part}" for part in ("tokenizer", "0", "1")}
    assert set(load(**EVERYTHING)["services"]) == set().union(*started.values())


@pytest.mark.parametrize("model", BESIDE)
def test_services_of_a_model_have_its_directory_and_no_other(model: str) -> None:
    services = load(**EVERYTHING)["services"]
    for name, service in services.items():
        sources = [v["source"] for v in service.get("volumes", []) if isinstance(v, dict)]
        if name.startswith(f"{model}-"):
            (mount,) = service["volumes"]
            assert mount["read_only"] is True
            assert mount["source"] == f"/some/{model}"
            (path,) = [v for k, v in service["environment"].items() if k.endswith("_MODEL")]
            assert path == mount["target"] == f"/models/{model}"
        else:
            assert f"/some/{model}" not in sources, name


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("tls", "MIAOTUI_TLS_DIR", "/tls"), ("cuda", "MIAOTUI_SHARD_DEVICE", "cuda")],
)
def test_overlays_reach_every_service(name: str, key: str, value: str) -> None:
    reached = 0
    for service_name, service, settings in ours(load(name, **EVERYTHING)):
        if name == "cuda" and (settings is not ShardSettings or service_name == "encoder"):
            assert "devices" not in service["deploy"]["resources"].get("reservations", {})
            continue
        assert service["environment"][key] == value, service_name
        if name == "tls":
            assert "tls:/tls:ro" in service["volumes"], service_name
            assert "make-certificates" in service["depends_on"], service_name
        else:
            assert service["deploy"]["resources"]["reservations"]["devices"], service_name
        reached += 1
    assert reached == (2 + 2 + 1 + 9 if name == "tls" else 2 + 6)


def test_the_encoder_turns_texts_into_vectors() -> None:
    environment = load()["services"]["encoder"]["environment"]
    settings = ShardSettings.model_validate(settings_in(environment, "MIAOTUI_SHARD_"))
    assert (settings.task, settings.addresses) == ("embed", ("encoder:50060",))
    assert str(settings.model) == "/opt/miaotui/encoder"
    assert f"bundled_folder())')\" {settings.model} " in (
        ROOT / "deploy" / "docker" / "Dockerfile"
    ).read_text("utf-8")


def test_interpolation() -> None:
    text = {"a": "${X:-one} $$Y ${Z:+set}", "b": ["${X}"]}
    assert interpolate(text, {}) == {"a": "one $Y ", "b": [""]}
    assert interpolate(text, {"X": "1", "Z": "2"}) == {"a": "1 $Y set", "b": ["1"]}


def test_secrets_are_random_and_stay(tmp_path: Path) -> None:
    script = ROOT / "deploy" / "compose" / "make-secrets.sh"

    def make(root: Path, **environment: str) -> dict[str, str]:
        for name in ("redis", "gateway", "grafana"):
            (root / name).mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["sh", script, root], env={"PATH": "/usr/bin:/bin", **environment}, check=True
        )
        assert done.returncode == 0
        files = sorted(root.rglob("*"))
        return {str(f.relative_to(root)): f.read_text() for f in files if f.is_file()}

    first, other = make(tmp_path / "one"), make(tmp_path / "two")
    assert make(tmp_path / "one") == first
    assert not set(first.values()) & set(other.values())
    assert all(len(value) >= 64 for value in first.values())
    password = first["redis/password"]
    assert first["redis/redis.conf"] == f"requirepass {password}\n"
    assert first["gateway/redis_url"] == f"redis://:{password}@redis:6379/0"
    assert make(tmp_path / "three", REDIS_PASSWORD="chosen")["redis/password"] == "chosen"
    with pytest.raises(subprocess.CalledProcessError):
        make(tmp_path / "four", REDIS_PASSWORD="a@b:c/d")


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("kind", ["plain", "tls"])
async def test_the_health_checks_work(stacks: Stacks, service: str, kind: str) -> None:
    """As the containers run them, against the services as the containers run them."""
    stack = getattr(stacks, kind)
    if (kind, service) == ("tls", "gateway"):
        # This stack's gateway speaks HTTPS, which the file leaves off.
        pytest.skip("checked in test_tls.py")
    done = stack.check(service)
    assert done.returncode == 0, done.stderr


async def test_traces_of_all_services_arrive(stacks: Stacks, collector: Collector) -> None:
    body = {"question": "Where is it?", "context": "It is in the harbour.", "no_cache": True}
    async with httpx.AsyncClient(trust_env=False, timeout=60.0) as client:
        reply = (await client.post(f"{stacks.plain.url}/v1/qa", json=body)).json()
    wanted = {"miaotui-gateway", "miaotui-tokenizer", "shard-0", "shard-1"}

    def whole(spans: list[Span]) -> bool:
        return {name for span in spans for name in (span.service, span.instance)} >= wanted

    assert whole(collector.trace(reply["trace_id"], whole))
