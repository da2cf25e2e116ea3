"""Which processes make up a Miaotui on one machine, and how they find each other."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from miaotui.cli import ports
from miaotui.cli.probes import grpc_probe, http_probe, shard_probe
from miaotui.cli.supervisor import Service

BUNDLED_MODEL = Path(__file__).parent.parent / "bundled" / "qa"
HTTP_PORT, GRPC_PORT, TOKENIZER_PORT, SHARD_PORT = 8080, 50050, 50051, 50060


class LayoutError(ValueError):
    """The processes cannot be laid out as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Wanted:
    """What the user asked of `miaotui up`. A port of 0 means any free one."""

    model: Path
    stages: int
    host: str = "127.0.0.1"
    http_port: int = HTTP_PORT
    grpc_port: int = GRPC_PORT
    # None: the usual one, or another free one, since nobody outside needs to know it.
    tokenizer_port: int | None = None
    shard_port: int | None = None
    layers: str = ""
    dtype: str = "auto"
    wire_dtype: str = "auto"
    device: str = "auto"
    redis_url: str | None = None
    log_level: str = "info"


@dataclass(frozen=True)
class Layout:
    """The processes, and where the outside finds them."""

    services: tuple[Service, ...]
    url: str
    grpc_target: str
    notes: tuple[str, ...] = field(default=())


def check_model(model: Path) -> None:
    """Raises `LayoutError` unless `model` looks like a model directory."""
    if not (model / "config.json").is_file():
        if model == BUNDLED_MODEL:
            raise LayoutError(
                f"the bundled model is missing ({model} has no config.json). This checkout is "
                "incomplete: fetch it again, or train the model with `make train`, or name "
                "another one with --model DIR."
            )
        problem = "has no config.json" if model.is_dir() else "is not a directory"
        raise LayoutError(
            f"{model} {problem}. --model takes a Hugging Face model directory, with "
            "config.json, the tokenizer's files and *.safetensors."
        )


def lay_out(wanted: Wanted) -> Layout:
    """Chooses ports and builds the processes' settings. Raises `LayoutError`."""
    check_model(wanted.model)
    if wanted.stages < 1:
        raise LayoutError(f"--stages must be at least 1, not {wanted.stages}")
    chosen = _Ports(wanted)
    model = str(wanted.model.resolve())
    tokenizer = f"127.0.0.1:{chosen.tokenizer}"
    stages = [f"127.0.0.1:{port}" for port in chosen.shards]
    client_host = "127.0.0.1" if wanted.host in ("0.0.0.0", "::") else wanted.host
    url = f"http://{client_host}:{chosen.http}"
    grpc_target = f"{client_host}:{chosen.grpc}"
    # Models come from the directory given; nothing may wait for a hub that is not asked.
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    services = [
        Service(
            "tokenizer",
            (sys.executable, "-m", "services.tokenizer"),
            {
                **offline,
                "MIAOTUI_TOKENIZER_MODEL": model,
                "MIAOTUI_TOKENIZER_LISTEN": tokenizer,
                "MIAOTUI_TOKENIZER_LOG_LEVEL": wanted.log_level.lower(),
            },
            grpc_probe(tokenizer),
            stop_order=2,
        )
    ]
    for index, address in enumerate(stages):
        services.append(
            Service(
                f"shard-{index}",
                (sys.executable, "-m", "services.shard"),
                {
                    **offline,
                    "MIAOTUI_SHARD_MODEL": model,
                    "MIAOTUI_SHARD_STAGE": str(index),
                    "MIAOTUI_SHARD_STAGES": ",".join(stages),
                    "MIAOTUI_SHARD_LISTEN": address,
                    "MIAOTUI_SHARD_LAYERS": wanted.layers,
                    "MIAOTUI_SHARD_DTYPE": wanted.dtype,
                    "MIAOTUI_SHARD_WIRE_DTYPE": wanted.wire_dtype,
                    "MIAOTUI_SHARD_DEVICE": wanted.device,
                    "MIAOTUI_SHARD_LOG_LEVEL": wanted.log_level.lower(),
                },
                shard_probe(address),
                stop_order=1,
            )
        )
    gateway = {
        **offline,
        "MIAOTUI_GATEWAY_HTTP_LISTEN": f"{wanted.host}:{chosen.http}",
        "MIAOTUI_GATEWAY_GRPC_LISTEN": f"{wanted.host}:{chosen.grpc}",
        "MIAOTUI_GATEWAY_TOKENIZER": tokenizer,
        "MIAOTUI_GATEWAY_SHARD": stages[0],
        "MIAOTUI_GATEWAY_LOG_LEVEL": wanted.log_level.lower(),
    }
    if wanted.redis_url:
        gateway["REDIS_URL"] = wanted.redis_url
    services.append(
        Service(
            "gateway",
            (sys.executable, "-m", "gateway"),
            gateway,
            http_probe(f"{url}/readyz"),
            stop_order=0,
        )
    )
    return Layout(tuple(services), url, grpc_target, tuple(chosen.notes))


class _Ports:
    """Ports for everything, all free at this moment and all different."""

    def __init__(self, wanted: Wanted) -> None:
        self._taken: set[int] = set()
        self.notes: list[str] = []
        self.http = self._outside(wanted.host, wanted.http_port, HTTP_PORT, "--http-port")
        self.grpc = self._outside(wanted.host, wanted.grpc_port, GRPC_PORT, "--grpc-port")
        self.tokenizer = self._inside(wanted.tokenizer_port, TOKENIZER_PORT, "--tokenizer-port")
        self.shards: list[int] = []
        for index in range(wanted.stages):
            if wanted.shard_port is None:
                self.shards.append(self._inside(None, SHARD_PORT + index, "--shard-port"))
            else:
                port = wanted.shard_port + index if wanted.shard_port else 0
                self.shards.append(self._inside(port, SHARD_PORT + index, "--shard-port"))

    def _outside(self, host: str, port: int, usual: int, flag: str) -> int:
        """A port that clients know: another one in its place would help nobody."""
        if port == 0:
            return self._take(ports.find_free(host, usual, self._taken))
        if port in self._taken:
            raise LayoutError(f"port {port} is asked for twice; change {flag}")
        if not ports.is_free(port, host):
            holder = ports.holder(port)
            by = f" by {holder}" if holder else ""
            raise LayoutError(
                f"port {port} on {host} is in use{by}. Choose another with {flag} "
                "(0: any free one), or stop what holds it."
            )
        return self._take(port)

    def _inside(self, port: int | None, usual: int, flag: str) -> int:
        if port is not None:
            return self._outside("127.0.0.1", port, usual, flag)
        found = ports.find_free("127.0.0.1", usual, self._taken)
        if found != usual and usual not in self._taken:
            self.notes.append(f"port {usual} is in use; {found} is taken instead")
        return self._take(found)

    def _take(self, port: int) -> int:
        self._taken.add(port)
        return port
