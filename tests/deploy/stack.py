"""The services of docker-compose.yml as processes of this machine, with the file's settings.

Only names of hosts, ports and paths of the containers are exchanged for ones that exist here.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.deploy.compose import BESIDE, ROOT, load
from tests.deploy.relay import Relay
from tests.processes import RedisServer, ServiceProcess, clean_environment, free_port

SERVICES = ("tokenizer", "shard-0", "shard-1", "gateway")
ENTRYPOINT = ROOT / "deploy" / "docker" / "entrypoint.sh"


class Stack:
    """Gateway, Redis and some of the models' services as `docker compose up` would configure them;
    the others are away.

    Two links pass relays that keep the bytes: gateway to tokenizer, and stage 0 to stage 1.
    """

    def __init__(
        self,
        directory: Path,
        model: Path,
        collector: str,
        *,
        tls: bool = False,
        services: Sequence[str] = SERVICES,
        beside: Mapping[str, Path] | None = None,
    ) -> None:
        """`collector`: host:port that takes traces. `tls`: with deploy/compose/tls.yml.

        `services`: those to run, the gateway among them. `beside`: directories of models of
        `compose.BESIDE`, whose profiles are on.
        """
        beside = beside or {}
        self.project = load(
            *(("tls",) if tls else ()),
            environment={BESIDE[name][1]: str(path) for name, path in beside.items()},
            profiles=tuple(BESIDE[name][0] for name in beside),
        )
        self.tls_dir = directory / "tls" if tls else None
        self._directory = directory
        self._paths = {
            "/opt/miaotui/model": str(model),
            "/run/secrets": str(directory / "secrets"),
            "/tls": str(directory / "tls"),
            "/documents": str(directory / "documents"),
        }
        # Longest first: a service's name may be the end of another's.
        names = sorted(self.project["services"], key=len, reverse=True)
        self._hosts = re.compile(rf"(?<![\w-])({'|'.join(names)}):(\d+)\b")
        self._ports: dict[tuple[str, str], int] = {}
        self.relays = {
            name: Relay(self.address(name, port))
            for name, port in (("tokenizer", "50051"), ("shard-1", "50060"))
            if name in services
        }
        self._collector = collector
        self.redis = self._make_redis()
        self.processes = {name: self._service(name) for name in services}

    # -- translation ----------------------------------------------------------------------

    def address(self, service: str, port: str) -> str:
        """Where a container's port is on this machine."""
        return f"127.0.0.1:{self._ports.setdefault((service, port), free_port())}"

    def translate(self, service: str, text: str) -> str:
        """A value of the Compose file as it must be here, in the place of `service`."""
        mounts = self.project["services"].get(service, {}).get("volumes", [])
        mounted = {one["target"]: one["source"] for one in mounts if isinstance(one, dict)}
        for path, real in {**self._paths, **mounted}.items():
            text = re.sub(rf"^{path}(?=/|$)", real, text)
        text = text.replace("collector:4317", self._collector)
        text = text.replace("{hostname}:", "127.0.0.1:")
        text = re.sub(
            r"\b(?:0\.0\.0\.0|127\.0\.0\.1):(50\d\d\d|8080)\b",
            lambda match: self.address(service, match[1]),
            text,
        )

        def host(match: re.Match[str]) -> str:
            relay = self.relays.get(match[1])
            # A stage knows itself by its own address; only its neighbour goes by the relay.
            if relay is not None and service != match[1]:
                return relay.address
            return self.address(match[1], match[2])

        return self._hosts.sub(host, text)

    def environment(self, service: str) -> dict[str, str]:
        """The environment of a service."""
        given = self.project["services"][service]["environment"]
        values = {k: self.translate(service, str(v)) for k, v in given.items()}
        for name in values:
            if name.endswith("_METRICS_PORT"):
                values[name] = self.address(service, values[name]).rpartition(":")[2]
        return {**values, "OTEL_BSP_SCHEDULE_DELAY": "200", "MIAOTUI_SHARD_DTYPE": "float32"}

    def command(self, service: str, words: list[str]) -> list[str]:
        """A command of the Compose file, with this machine's Python and addresses."""
        words = [self.translate(service, word) for word in words]
        return [sys.executable if word == "python" else word for word in words]

    def _service(self, name: str) -> ServiceProcess:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        arguments = self.command(name, self.project["services"][name]["command"])
        return ServiceProcess(
            name,
            ["/bin/sh", str(ENTRYPOINT), *arguments],
            {**self.environment(name), "PATH": path},
            self._directory / f"{name}.log",
        )

    def _make_redis(self) -> RedisServer:
        for name in ("redis", "gateway", "grafana"):
            (self._directory / "secrets" / name).mkdir(parents=True)
        script = ROOT / "deploy" / "compose" / "make-secrets.sh"
        subprocess.run(["sh", script, self._directory / "secrets"], check=True)
        redis = RedisServer(self._directory)
        words = self.project["services"]["redis"]["command"]
        # redis-server takes one word or several in an argument.
        arguments = [self.translate("redis", word) for word in words][1:]
        port = ["--port", str(redis.port)]
        scheme, query = "redis", ""
        if self.tls_dir is not None:
            make = self.project["services"]["make-certificates"]["command"][0]
            shell = self.translate("", make.replace("/tls", str(self.tls_dir)))
            shell = shell.replace("exec python", f"exec {sys.executable}")
            subprocess.run(["sh", "-c", shell], check=True, env=clean_environment(), cwd=ROOT)
            files = (("cert", "tls.crt"), ("key", "tls.key"), ("ca-cert", "ca.crt"))
            own = [w for f, n in files for w in (f"--tls-{f}-file", str(self.tls_dir / n))]
            port = ["--port", "0", "--tls-port", str(redis.port), "--tls-auth-clients", "no", *own]
            scheme, query = "rediss", f"?ssl_ca_certs={self.tls_dir / 'ca.crt'}"
        redis.argv = [redis.argv[0], *arguments, *port, "--dir", str(self._directory)]
        url = self._directory / "secrets" / "gateway" / "redis_url"
        password = url.read_text().partition("@")[0].partition("//")[2]
        url.write_text(f"{scheme}://{password}@127.0.0.1:{redis.port}/0{query}")
        return redis

    # -- life -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts all, and does not wait."""
        for relay in self.relays.values():
            await relay.start()
        self.redis.start()
        for process in self.processes.values():
            process.start()

    async def stop(self) -> None:
        """Stops all, the gateway first; fails where one does not stop by itself."""
        await asyncio.to_thread(self.processes["gateway"].stop)
        for process in self.processes.values():
            process.ask_to_stop()
        for process in (*self.processes.values(), self.redis):
            await asyncio.to_thread(process.stop)
        for relay in self.relays.values():
            await relay.stop()

    @property
    def url(self) -> str:
        """The gateway's."""
        scheme = "https" if "MIAOTUI_GATEWAY_HTTPS" in self.processes["gateway"].env else "http"
        return f"{scheme}://{self.address('gateway', '8080')}"

    def check(self, service: str) -> subprocess.CompletedProcess[str]:
        """Runs the container's health check."""
        kind, *words = self.project["services"][service]["healthcheck"]["test"]
        assert kind == "CMD"
        return subprocess.run(
            self.command(service, words),
            env={**clean_environment(), **self.environment(service)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    def metrics(self, service: str) -> str:
        """What Prometheus would scrape."""
        port = "8080" if service == "gateway" else "9464"
        url = f"http://{self.address(service, port)}/metrics"
        return httpx.get(url, trust_env=False, timeout=60).raise_for_status().text


async def answered(client: httpx.AsyncClient, url: str, question: str, context: str) -> Any:
    """An answer that no cache had."""
    body = {"question": question, "context": context, "no_cache": True}
    reply = await client.post(f"{url}/v1/qa", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()
