"""The Helm chart, rendered by Helm itself, and what the tests read of it."""

from __future__ import annotations

from typing import Any

import helm_python

from services.shard.settings import ShardSettings
from tests.deploy.compose import ROOT, read_yaml

CHART = ROOT / "deploy" / "helm" / "miaotui"
EVERYTHING: dict[str, Any] = {
    "model": {"path": "/models/mine", "volume": {"persistentVolumeClaim": {"claimName": "models"}}},
    "stages": {
        "count": 3,
        "replicas": 2,
        "layers": "0-2,2-4,4-6",
        "gpus": 1,
        "settings": {"queue_sequences": 4096, "kv_cache_bytes": 8 << 30, "drain_seconds": 60},
        "nodeSelector": {"gpu": "yes"},
        "tolerations": [{"operator": "Exists"}],
        "autoscaling": {"enabled": True},
    },
    "tokenizer": {"autoscaling": {"enabled": True}},
    "encoder": {"stages": {"count": 2, "gpus": 1, "settings": {"drain_seconds": 20}}},
    "gateway": {
        "autoscaling": {"enabled": True},
        "ingress": {"enabled": True, "host": "qa.example", "tlsSecretName": "web"},
        "documents": {"existingSecret": "documents-database", "port": 6432},
    },
    "cache": {"encrypt": True},
    "keys": {"existingSecret": "api-keys", "metricsSecret": "scraper"},
    "redis": {"url": "rediss://:password@redis.example:6379/0"},
    "passages": {"existingSecret": "passages", "encrypt": True, "port": 6380},
    "tls": {"secretName": "certificates", "https": True},
    "telemetry": {"otlpEndpoint": "collector.example:4317", "serviceMonitor": {"enabled": True}},
    "networkPolicy": {
        "gatewayFrom": [{"namespaceSelector": {"matchLabels": {"team": "web"}}}],
        "documentsTo": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
        "passagesTo": [{"ipBlock": {"cidr": "10.1.0.0/16"}}],
    },
    "priorityClassName": "high",
    "podAnnotations": {"a": "b"},
}
# Stages that scale apart, of a model beside the bundled one.
WRITING: dict[str, Any] = {
    "stages": {"each": {"1": {"replicas": 2}}},
    "generator": {
        "enabled": True,
        "model": {"volume": {"persistentVolumeClaim": {"claimName": "writer"}}},
        "stages": {
            "count": 3,
            "replicas": 2,
            "gpus": 1,
            "each": {"1": {"replicas": 3}, "2": {"gpus": 0, "maxReplicas": 1}},
        },
        "tokenizer": {"replicas": 2},
    },
    "encoder": {"stages": {"replicas": 2}},
    "telemetry": {"serviceMonitor": {"enabled": True}},
}
# All that there are, each of a volume of its own.
ALL: dict[str, Any] = {
    **WRITING,
    "transcriber": {
        "enabled": True,
        "model": {"volume": {"persistentVolumeClaim": {"claimName": "whisper"}}},
        "stages": {"count": 2, "each": {"0": {"gpus": 1}}, "autoscaling": {"enabled": True}},
        "tokenizer": {"settings": {"max_files": 8}, "autoscaling": {"enabled": True}},
    },
    "captioner": {
        "enabled": True,
        "model": {"path": "/models/vit", "volume": {"hostPath": {"path": "/data/vit"}}},
        "stages": {"count": 1, "replicas": 2, "settings": {"kv_cache_bytes": 1 << 30}},
    },
    "tls": {"secretName": "certificates"},
}
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": EVERYTHING,
    "one stage": {"stages": {"count": 1}},
    "no encoder": {"encoder": {"enabled": False}},
    "two models": WRITING,
    "all models": ALL,
    "sees only": {"captioner": {"enabled": True}},
}
Manifest = dict[str, Any]
# Before the names of each model's components, with the gateway's settings that name its stage 0
# and its tokenizer. "" finds answers.
PREFIXES = {
    "": ("SHARD", "TOKENIZER"),
    **{
        f"{name}-": (f"{name.upper()}_SHARD", f"{name.upper()}_TOKENIZER")
        for name in ("generator", "transcriber", "captioner")
    },
    "encoder-": ("ENCODER_STAGES", None),
}


def render(values: dict[str, Any]) -> list[Manifest]:
    """What `helm template demo CHART --namespace prod` prints, without the notes."""
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values, name="demo", namespace="prod")
    texts = [text for path, text in files.items() if path.endswith(".yaml")]
    return [manifest for text in texts for manifest in read_yaml(text) if manifest]


def of_kind(manifests: list[Manifest], *kinds: str) -> dict[str, Manifest]:
    """Those of some kinds, by name."""
    return {m["metadata"]["name"]: m for m in manifests if m["kind"] in kinds}


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Pod templates by the name of what makes them."""
    workloads = of_kind(manifests, "StatefulSet", "Deployment")
    return {name: workload["spec"]["template"] for name, workload in workloads.items()}


def environment(pod: Manifest) -> dict[str, Any]:
    """Variables of a pod's only container; what comes from elsewhere as it stands."""
    (container,) = pod["spec"]["containers"]
    names = [variable["name"] for variable in container["env"]]
    assert len(set(names)) == len(names)
    return {v["name"]: v.get("value", v.get("valueFrom")) for v in container["env"]}


def matches(selector: dict[str, str], pod: Manifest) -> bool:
    """Whether a selector picks a pod."""
    labels: dict[str, str] = pod["metadata"]["labels"]
    return selector.items() <= labels.items()


def by_model(manifests: list[Manifest]) -> dict[str, dict[str, Manifest]]:
    """Stages' StatefulSets by name, of each model by its prefix."""
    sets = of_kind(manifests, "StatefulSet")
    found = {
        prefix: {n: s for n, s in sets.items() if n.startswith(f"demo-miaotui-{prefix}stage-")}
        for prefix in PREFIXES
    }
    assert sum(map(len, found.values())) == len(sets)
    return {prefix: sets for prefix, sets in found.items() if sets}


def settings_of(pod: Manifest) -> ShardSettings:
    """What a stage would read."""
    text = {k: v for k, v in environment(pod).items() if isinstance(v, str)}
    return ShardSettings.model_validate(
        {k.removeprefix("MIAOTUI_SHARD_").lower(): v for k, v in text.items() if "SHARD" in k}
    )
