"""Which processes make up a Miaotui on one machine, and how they find each other."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from miaotui.cli import ports
from miaotui.cli.probes import grpc_probe, http_probe, shard_probe
from miaotui.cli.supervisor import Service

BUNDLED_MODEL = Path(__file__).parent.parent / "bundled" / "qa"
HTTP_PORT, GRPC_PORT, TOKENIZER_PORT, SHARD_PORT = 8080, 50050, 50051, 50060
GENERATOR_TOKENIZER_PORT, GENERATOR_SHARD_PORT = 50052, 50080
# Models come from the directory given; nothing may wait for a hub that is not asked.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class LayoutError(ValueError):
    """The processes cannot be laid out as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Wanted:
    """What the user asked of `miaotui up`. A port of 0 means any free one."""

    # The model that finds answers; None: none.
    model: Path | None
    stages: int
    # The model that writes text; None: none.
    generator: Path | None = None
    generator_stages: int = 2
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
    documents: Path | None = None
    log_level: str = "info"


@dataclass(frozen=True)
class Layout:
    """The processes, and where the outside finds them."""

    services: tuple[Service, ...]
    url: str
    grpc_target: str
    answers: bool = True
    """Whether there is a model that finds answers."""
    writes: bool = False
    """Whether there is a model that writes text."""
    notes: tuple[str, ...] = field(default=())


def check_model(model: Path, flag: str = "--model") -> None:
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
            f"{model} {problem}. {flag} takes a Hugging Face model directory, with "
            "config.json, the tokenizer's files and *.safetensors."
        )


def _check(wanted: Wanted) -> None:
    if wanted.model is None and wanted.generator is None:
        raise LayoutError(
            "there is no model to serve. Leave --no-qa out, or name a model that writes with "
            "--generator DIR"
        )
    for model, stages, flag, kind in (
        (wanted.model, wanted.stages, "--model", "extractive"),
        (wanted.generator, wanted.generator_stages, "--generator", "generative"),
    ):
        if model is None:
            continue
        check_model(model, flag)
        if (found := _kind(model)) not in (kind, ""):
            wrong = "finds answers and writes no text" if found == "extractive" else "writes text"
            other = "--model" if found == "extractive" else "--generator"
            raise LayoutError(f"{flag} {model}: this model {wrong}; give it with {other}")
        if stages < 1:
            many = "--stages" if kind == "extractive" else "--generator-stages"
            raise LayoutError(f"{many} must be at least 1, not {stages}")


def _kind(model: Path) -> str:
    """What a model does, as far as its directory says so; the services look closer."""
    try:
        config = json.loads((model / "config.json").read_text("utf-8"))
        names = " ".join(config.get("architectures") or ())
    except (ValueError, AttributeError, TypeError):
        return ""
    if "QuestionAnswering" in names:
        return "extractive"
    return "generative" if "CausalLM" in names or "LMHead" in names else ""


def lay_out(wanted: Wanted) -> Layout:
    """Chooses ports and builds the processes' settings. Raises `LayoutError`."""
    _check(wanted)
    chosen = _Ports(wanted)
    client_host = "127.0.0.1" if wanted.host in ("0.0.0.0", "::") else wanted.host
    url = f"http://{client_host}:{chosen.http}"
    gateway = {
        **_OFFLINE,
        "MIAOTUI_GATEWAY_HTTP_LISTEN": f"{wanted.host}:{chosen.http}",
        "MIAOTUI_GATEWAY_GRPC_LISTEN": f"{wanted.host}:{chosen.grpc}",
        "MIAOTUI_GATEWAY_LOG_LEVEL": wanted.log_level.lower(),
    }
    services: list[Service] = []
    for prefix, model, layers, ring in (
        ("", wanted.model, wanted.layers, chosen.answering),
        ("generator-", wanted.generator, "", chosen.writing),
    ):
        tokenizer, stages = "", [""]
        if model is not None:
            tokenizer = f"127.0.0.1:{ring.tokenizer}"
            stages = [f"127.0.0.1:{port}" for port in ring.shards]
            services += _model_services(prefix, model, layers, tokenizer, stages, wanted)
        name = prefix.replace("-", "_").upper()
        gateway[f"MIAOTUI_GATEWAY_{name}TOKENIZER"] = tokenizer
        gateway[f"MIAOTUI_GATEWAY_{name}SHARD"] = stages[0]
    if wanted.documents:
        gateway["MIAOTUI_GATEWAY_DOCUMENTS"] = str(wanted.documents.expanduser().resolve())
    if wanted.redis_url:
        gateway["REDIS_URL"] = wanted.redis_url
    argv = (sys.executable, "-m", "gateway")
    services.append(Service("gateway", argv, gateway, http_probe(f"{url}/readyz"), stop_order=0))
    return Layout(
        tuple(services),
        url,
        f"{client_host}:{chosen.grpc}",
        answers=wanted.model is not None,
        writes=wanted.generator is not None,
        notes=tuple(chosen.notes),
    )


def _model_services(
    prefix: str, model: Path, layers: str, tokenizer: str, stages: list[str], wanted: Wanted
) -> list[Service]:
    """A model's tokenizer service and its stages; `prefix` is that of their names."""
    directory = str(model.resolve())
    services = [
        Service(
            f"{prefix}tokenizer",
            (sys.executable, "-m", "services.tokenizer"),
            {
                **_OFFLINE,
                "MIAOTUI_TOKENIZER_MODEL": directory,
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
                f"{prefix}shard-{index}",
                (sys.executable, "-m", "services.shard"),
                {
                    **_OFFLINE,
                    "MIAOTUI_SHARD_MODEL": directory,
                    "MIAOTUI_SHARD_STAGE": str(index),
                    "MIAOTUI_SHARD_STAGES": ",".join(stages),
                    "MIAOTUI_SHARD_LISTEN": address,
                    "MIAOTUI_SHARD_LAYERS": layers,
                    "MIAOTUI_SHARD_DTYPE": wanted.dtype,
                    "MIAOTUI_SHARD_WIRE_DTYPE": wanted.wire_dtype,
                    "MIAOTUI_SHARD_DEVICE": wanted.device,
                    "MIAOTUI_SHARD_LOG_LEVEL": wanted.log_level.lower(),
                },
                shard_probe(address),
                stop_order=1,
            )
        )
    return services


@dataclass(frozen=True)
class _Ring:
    """A model's ports."""

    tokenizer: int = 0
    shards: tuple[int, ...] = ()


class _Ports:
    """Ports for everything, all free at this moment and all different."""

    def __init__(self, wanted: Wanted) -> None:
        self._taken: set[int] = set()
        self.notes: list[str] = []
        self.http = self._outside(wanted.host, wanted.http_port, HTTP_PORT, "--http-port")
        self.grpc = self._outside(wanted.host, wanted.grpc_port, GRPC_PORT, "--grpc-port")
        self.answering = self.writing = _Ring()
        if wanted.model is not None:
            tokenizer = self._inside(wanted.tokenizer_port, TOKENIZER_PORT, "--tokenizer-port")
            shards = []
            for index in range(wanted.stages):
                # 0: any free one, for each.
                port = wanted.shard_port and wanted.shard_port + index
                shards.append(self._inside(port, SHARD_PORT + index, "--shard-port"))
            self.answering = _Ring(tokenizer, tuple(shards))
        if wanted.generator is not None:
            tokenizer = self._inside(None, GENERATOR_TOKENIZER_PORT, "")
            usual = range(GENERATOR_SHARD_PORT, GENERATOR_SHARD_PORT + wanted.generator_stages)
            self.writing = _Ring(tokenizer, tuple(self._inside(None, p, "") for p in usual))

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
