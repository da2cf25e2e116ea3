"""Which processes make up a Miaotui on one machine, and how they find each other."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from miaotui.cli import ports
from miaotui.cli.probes import grpc_probe, http_probe, shard_probe
from miaotui.cli.supervisor import Service
from miaotui.media.features import modality_of
from miaotui.retrieval.encoder import EncoderError, bundled_folder
from miaotui.retrieval.postgres.location import is_postgres

BUNDLED_MODEL = Path(__file__).parent.parent / "bundled" / "qa"
HTTP_PORT, GRPC_PORT, TOKENIZER_PORT, SHARD_PORT = 8080, 50050, 50051, 50060
GENERATOR_TOKENIZER_PORT, GENERATOR_SHARD_PORT = 50052, 50080
TRANSCRIBER_TOKENIZER_PORT, TRANSCRIBER_SHARD_PORT = 50053, 50120
CAPTIONER_TOKENIZER_PORT, CAPTIONER_SHARD_PORT = 50054, 50140
ENCODER_PORT = 50100
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
    # The model that writes down what is said; None: none.
    transcriber: Path | None = None
    transcriber_stages: int = 2
    # The model that describes pictures; None: none.
    captioner: Path | None = None
    captioner_stages: int = 2
    # Of the encoder that finds documents by their meaning; 0: none.
    encoder_stages: int = 1
    # Of each stage of these models: one number for all, or one a stage, comma-separated.
    replicas: str = "1"
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
    # A folder, or a PostgreSQL database's URL, which may hold a password.
    documents: str | None = field(default=None, repr=False)
    keys: Path | None = None
    log_level: str = "info"

    @property
    def models(self) -> tuple[Part, ...]:
        """The models asked for, but for the encoder."""
        parts = (
            Part("", self.model, self.stages, "--model", "extractive"),
            Part("generator-", self.generator, self.generator_stages, "--generator", "generative"),
            Part(
                *("transcriber-", self.transcriber, self.transcriber_stages),
                *("--transcriber", "transcribing"),
            ),
            Part(
                *("captioner-", self.captioner, self.captioner_stages),
                *("--captioner", "captioning"),
            ),
        )
        return tuple(part for part in parts if part.directory is not None)


@dataclass(frozen=True)
class Part:
    """A model of a layout."""

    prefix: str
    """Of its services' names."""
    directory: Path | None
    stages: int
    flag: str
    """Names it on the command line."""
    kind: str


def _variable(prefix: str) -> str:
    """The beginning of the gateway's settings of a model."""
    return f"MIAOTUI_GATEWAY_{prefix.replace('-', '_').upper()}"


# The ports that a model's tokenizer and its first stage usually have, by the prefix.
_USUAL_PORTS = {
    "": (TOKENIZER_PORT, SHARD_PORT),
    "generator-": (GENERATOR_TOKENIZER_PORT, GENERATOR_SHARD_PORT),
    "transcriber-": (TRANSCRIBER_TOKENIZER_PORT, TRANSCRIBER_SHARD_PORT),
    "captioner-": (CAPTIONER_TOKENIZER_PORT, CAPTIONER_SHARD_PORT),
}
# What a model does, and the flag that takes it.
_KINDS = {
    "extractive": ("finds answers and writes no text", "--model"),
    "generative": ("writes text", "--generator"),
    "transcribing": ("writes down what is said", "--transcriber"),
    "captioning": ("describes pictures", "--captioner"),
}


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
    hears: bool = False
    """Whether there is a model that writes down what is said."""
    sees: bool = False
    """Whether there is a model that describes pictures."""
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
    if not wanted.models:
        raise LayoutError(
            "there is no model to serve. Leave --no-qa out, or name a model that writes with "
            "--generator DIR"
        )
    for part in wanted.models:
        assert part.directory is not None, "of those asked for"
        check_model(part.directory, part.flag)
        if (found := _kind(part.directory)) not in (part.kind, ""):
            does, flag = _KINDS[found]
            raise LayoutError(
                f"{part.flag} {part.directory}: this model {does}; give it with {flag}"
            )
        if part.stages < 1:
            many = f"--{part.prefix}stages"
            raise LayoutError(f"{many} must be at least 1, not {part.stages}")


def _kind(model: Path) -> str:
    """What a model does, as far as its directory says so; the services look closer."""
    try:
        config = json.loads((model / "config.json").read_text("utf-8"))
        names = " ".join(config.get("architectures") or ())
        media = modality_of(config)
    except (ValueError, AttributeError, TypeError):
        return ""
    if media is not None:
        return "transcribing" if media == "audio" else "captioning"
    if "QuestionAnswering" in names:
        return "extractive"
    return "generative" if "CausalLM" in names or "LMHead" in names else ""


def lay_out(wanted: Wanted) -> Layout:
    """Chooses ports and builds the processes' settings. Raises `LayoutError`."""
    _check(wanted)
    wanted = _decide_dtype(wanted)
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
    # One that is empty tells the gateway that there is no such model, whatever it inherits.
    for prefix in _USUAL_PORTS:
        gateway |= {f"{_variable(prefix)}{part}": "" for part in ("TOKENIZER", "SHARD")}
    for part in wanted.models:
        ring = chosen.rings[part.prefix]
        tokenizer = f"127.0.0.1:{ring.tokenizer}"
        stages = [[f"127.0.0.1:{port}" for port in ports] for ports in ring.shards]
        services += _model_services(part, tokenizer, stages, wanted)
        gateway[f"{_variable(part.prefix)}TOKENIZER"] = tokenizer
        gateway[f"{_variable(part.prefix)}SHARD"] = ",".join(stages[0])
    if chosen.encoding:
        services += _encoder_services(chosen.encoding, wanted)
        gateway["MIAOTUI_GATEWAY_ENCODER_STAGES"] = f"127.0.0.1:{chosen.encoding[0]}"
    if wanted.documents:
        place = wanted.documents
        if not is_postgres(place):
            place = str(Path(place).expanduser().resolve())
        gateway["MIAOTUI_GATEWAY_DOCUMENTS"] = place
    if wanted.keys:
        if not wanted.keys.expanduser().is_file():
            raise LayoutError(
                f"{wanted.keys} is not there. Make it with `miaotui keys create NAME --keys "
                f"{wanted.keys}`"
            )
        gateway["MIAOTUI_GATEWAY_KEYS"] = str(wanted.keys.expanduser().absolute())
    if wanted.redis_url:
        gateway["REDIS_URL"] = wanted.redis_url
    grpc_target = f"{client_host}:{chosen.grpc}"
    # Unless the environment names a collector, for everything that runs here.
    shown = {"MIAOTUI_TRACES_TO": grpc_target}
    services = [replace(service, env={**shown, **service.env}) for service in services]
    argv = (sys.executable, "-m", "gateway")
    services.append(Service("gateway", argv, gateway, http_probe(f"{url}/readyz"), stop_order=0))
    return Layout(
        tuple(services),
        url,
        grpc_target,
        answers=wanted.model is not None,
        writes=wanted.generator is not None,
        hears=wanted.transcriber is not None,
        sees=wanted.captioner is not None,
        notes=tuple(chosen.notes),
    )


def _decide_dtype(wanted: Wanted) -> Wanted:
    """Finds out what "fast" means here, once for all stages, which must agree."""
    if wanted.dtype != "fast":
        return wanted
    # torch is in that process only, for as long as this takes.
    argv = (sys.executable, "-m", "miaotui.models.precision", wanted.dtype, wanted.device)
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise LayoutError(f"--dtype fast: {done.stderr.strip() or 'the trial failed'}")
    return replace(wanted, dtype=done.stdout.strip())


def _model_services(
    part: Part, tokenizer: str, stages: list[list[str]], wanted: Wanted
) -> list[Service]:
    """A model's tokenizer service and its stages."""
    assert part.directory is not None, "of those asked for"
    directory, prefix = str(part.directory.resolve()), part.prefix
    layers = wanted.layers if part.kind == "extractive" else ""
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
    listed = ",".join("|".join(replicas) for replicas in stages)
    for index, replicas in enumerate(stages):
        for replica, address in enumerate(replicas):
            # The first one keeps the name that it has where it is alone.
            name = f"{prefix}shard-{index}" + (f"-{replica}" if replica else "")
            services.append(
                Service(
                    name,
                    (sys.executable, "-m", "services.shard"),
                    {
                        **_OFFLINE,
                        "MIAOTUI_SHARD_MODEL": directory,
                        "MIAOTUI_SHARD_STAGE": str(index),
                        "MIAOTUI_SHARD_STAGES": listed,
                        "MIAOTUI_SHARD_REPLICA": str(replica),
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


def _encoder_services(ports: tuple[int, ...], wanted: Wanted) -> list[Service]:
    """The encoder's stages. Small, and beside those that answer: they take little of the machine
    and nothing waits for them."""
    addresses = [f"127.0.0.1:{port}" for port in ports]
    colocated = len(ports) + sum(part.stages for part in wanted.models)
    return [
        Service(
            f"encoder-{index}",
            (sys.executable, "-m", "services.shard"),
            {
                **_OFFLINE,
                "MIAOTUI_SHARD_TASK": "embed",
                "MIAOTUI_SHARD_MODEL": str(bundled_folder()),
                "MIAOTUI_SHARD_STAGE": str(index),
                "MIAOTUI_SHARD_STAGES": ",".join(addresses),
                "MIAOTUI_SHARD_LISTEN": address,
                # Vectors are kept, and compared with those that are made elsewhere.
                "MIAOTUI_SHARD_DTYPE": "float32",
                "MIAOTUI_SHARD_DEVICE": "cpu",
                "MIAOTUI_SHARD_COLOCATED_STAGES": str(colocated),
                "MIAOTUI_SHARD_LOG_LEVEL": wanted.log_level.lower(),
            },
            shard_probe(address),
            stop_order=1,
            needed=False,
        )
        for index, address in enumerate(addresses)
    ]


def replica_counts(replicas: str, stages: int) -> tuple[int, ...]:
    """`"2"` → 2 of every stage; `"1,2"` → one of stage 0 and two of stage 1.

    Raises `LayoutError`.
    """
    try:
        counts = tuple(int(part) for part in replicas.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise LayoutError(
            f"--replicas {replicas}: give one number for all stages, or one a stage, such as 1,2"
        )
    if len(counts) == 1:
        return counts * stages
    if len(counts) != stages:
        raise LayoutError(
            f"--replicas {replicas} names {len(counts)} stages, and there are {stages}"
        )
    return counts


@dataclass(frozen=True)
class _Ring:
    """A model's ports."""

    tokenizer: int = 0
    shards: tuple[tuple[int, ...], ...] = ()
    """Of each stage, its replicas'."""


class _Ports:
    """Ports for everything, all free at this moment and all different."""

    def __init__(self, wanted: Wanted) -> None:
        self._taken: set[int] = set()
        self.notes: list[str] = []
        self.http = self._outside(wanted.host, wanted.http_port, HTTP_PORT, "--http-port")
        self.grpc = self._outside(wanted.host, wanted.grpc_port, GRPC_PORT, "--grpc-port")
        self.rings: dict[str, _Ring] = {}
        """By the prefix of a model's services."""
        for part in wanted.models:
            first = part.prefix == ""
            usual_tokenizer, usual_shard = _USUAL_PORTS[part.prefix]
            tokenizer = self._inside(
                wanted.tokenizer_port if first else None, usual_tokenizer, "--tokenizer-port"
            )
            given = wanted.shard_port if first else None
            shards = self._shards(part.stages, wanted.replicas, usual_shard, given)
            self.rings[part.prefix] = _Ring(tokenizer, shards)
        self.encoding: tuple[int, ...] = ()
        """Of the encoder's stages."""
        if wanted.encoder_stages:
            try:
                bundled_folder()
            except EncoderError as error:
                self.notes.append(f"documents are found by their words only: {error}")
            else:
                own = self._shards(wanted.encoder_stages, "1", ENCODER_PORT, None)
                self.encoding = tuple(ports[0] for ports in own)

    def _shards(
        self, stages: int, replicas: str, usual: int, given: int | None
    ) -> tuple[tuple[int, ...], ...]:
        """Of each stage, its replicas' ports: the first ones' in a row, then all others."""
        counts = replica_counts(replicas, stages)
        chosen: list[list[int]] = [[] for _ in range(stages)]
        places = [(n, index) for n in range(max(counts)) for index in range(stages)]
        for number, (_, index) in enumerate(p for p in places if p[0] < counts[p[1]]):
            # 0: any free one, for each.
            port = given and given + number
            chosen[index].append(self._inside(port, usual + number, "--shard-port"))
        return tuple(map(tuple, chosen))

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
