"""The Helm chart: rendered by Helm itself, checked against Kubernetes' own schemas."""

from __future__ import annotations

import json
import re
from typing import Any

import helm_python
import kubernetes_validate
import pytest
from pydantic import ValidationError

from gateway.settings import GatewaySettings
from miaotui.cli.serve import variable
from services.shard.settings import ShardSettings
from services.tokenizer.settings import TokenizerSettings
from tests.deploy.compose import ROOT, read_yaml
from tests.deploy.test_compose import OPEN_TELEMETRY, SETTINGS

CHART = ROOT / "deploy" / "helm" / "miaotui"
DASHBOARDS = ROOT / "deploy" / "observability" / "grafana" / "dashboards"
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
# The oldest that the chart takes, and a newer one.
KUBERNETES = ("1.28", "1.37")
# Not of Kubernetes itself.
CUSTOM = {"ServiceMonitor"}
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
    },
    "cache": {"encrypt": True},
    "keys": {"existingSecret": "api-keys", "metricsSecret": "scraper"},
    "redis": {"url": "rediss://:password@redis.example:6379/0"},
    "tls": {"secretName": "certificates", "https": True},
    "telemetry": {"otlpEndpoint": "collector.example:4317", "serviceMonitor": {"enabled": True}},
    "networkPolicy": {"gatewayFrom": [{"namespaceSelector": {"matchLabels": {"team": "web"}}}]},
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
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": EVERYTHING,
    "one stage": {"stages": {"count": 1}},
    "no encoder": {"encoder": {"enabled": False}},
    "two models": WRITING,
}
Manifest = dict[str, Any]
# Before the names of each model's components, with the gateway's settings that name its stage 0
# and its tokenizer. "" finds answers.
PREFIXES = {
    "": ("SHARD", "TOKENIZER"),
    "generator-": ("GENERATOR_SHARD", "GENERATOR_TOKENIZER"),
    "encoder-": ("ENCODER_STAGES", None),
}


def render(values: dict[str, Any]) -> list[Manifest]:
    """What `helm template demo CHART --namespace prod` prints, without the notes."""
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values, name="demo", namespace="prod")
    texts = [text for path, text in files.items() if path.endswith(".yaml")]
    return [manifest for text in texts for manifest in read_yaml(text) if manifest]


@pytest.fixture(params=VALUES)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    """The chart rendered with several values."""
    return render(VALUES[request.param])


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


def test_lint() -> None:
    for values in VALUES.values():
        report = helm_python.lint(CHART, values=values, strict=True)
        problems = [m for m in report["messages"] if m["severity"] > 1]
        assert not report["errors"], report["errors"]
        assert not problems, problems


@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_are_valid(manifests: list[Manifest], version: str) -> None:
    checked = 0
    for manifest in manifests:
        if manifest["kind"] in CUSTOM:
            continue
        kubernetes_validate.validate(manifest, version, strict=True)
        checked += 1
    assert checked >= 10
    names = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(set(names)) == len(names)


def test_a_broken_manifest_is_noticed() -> None:
    (broken, *_) = of_kind(render({}), "StatefulSet").values()
    broken["spec"]["replicaz"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES[0], strict=True)


@pytest.mark.parametrize(
    "values",
    [
        {"image": {"digest": "sha256:1234"}},
        {"stages": {"count": 0}},
        {"stages": {"layer": "0-3"}},
        {"stages": {"each": {"first": {"replicas": 2}}}},
        {"stages": {"each": {"1": {"dtype": "float16"}}}},
        {"generator": {"stages": {"count": 0}}},
        {"encoder": {"stages": {"count": 0}}},
        {"encoder": {"model": {"path": "/models/other"}}},
        {"stages": {"layers": "0-3;3-6"}},
        {"stages": {"dtype": "float8"}},
        {"redis": {"url": "http://redis"}},
        {"tls": {"https": True}},
        {"keys": {"secret": "s"}},
        {"gateway": {"ingress": {"enabled": True}}},
        {"telemetry": {"otlpEndpoint": "http://collector:4317"}},
    ],
    ids=str,
)
def test_wrong_values_are_refused(values: dict[str, Any]) -> None:
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema({})
        with pytest.raises(helm_python.HelmError):
            chart.validate_schema(values)


def test_variables_are_settings(manifests: list[Manifest]) -> None:
    for name, pod in pods(manifests).items():
        (container,) = pod["spec"]["containers"]
        settings = SETTINGS[container["args"][1]]
        known = {variable(settings, field) for field in settings.model_fields}
        known |= OPEN_TELEMETRY | {"POD", "REDIS_URL"}
        assert set(environment(pod)) <= known, name


def test_keys_are_mounted_as_a_directory_and_prometheus_has_one() -> None:
    manifests = render(EVERYTHING)
    pod = pods(manifests)["demo-miaotui-gateway"]
    (container,) = pod["spec"]["containers"]
    path = environment(pod)["MIAOTUI_GATEWAY_KEYS"]
    mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
    mount = mounts[path.rpartition("/")[0]]
    # What is mounted by its sub-path would never change.
    assert "subPath" not in mount
    (volume,) = [v for v in pod["spec"]["volumes"] if v["name"] == mount["name"]]
    assert volume["secret"]["secretName"] == "api-keys"
    assert (
        environment(pod)["MIAOTUI_GATEWAY_CACHE_ENCRYPTION_KEY"]["secretKeyRef"]["key"]
        in (of_kind(manifests, "Secret")["demo-miaotui-cache"]["data"])
    )
    monitor = of_kind(manifests, "ServiceMonitor")["demo-miaotui-gateway"]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "scraper", "key": "key"}
    assert "MIAOTUI_GATEWAY_KEYS" not in environment(pods(render({}))["demo-miaotui-gateway"])


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


def test_stages_find_all_replicas_of_each_other(manifests: list[Manifest]) -> None:
    services = of_kind(manifests, "Service")
    scalers = of_kind(manifests, "HorizontalPodAutoscaler")
    for sets in by_model(manifests).values():
        most = [
            workload["spec"].get("replicas") or scalers[name]["spec"]["maxReplicas"]
            for name, workload in sets.items()
        ]
        # The same, were all pods listed by name.
        listed = ",".join(
            "|".join(f"s{stage}-{pod}:1" for pod in range(count))
            for stage, count in enumerate(most)
        )
        for stage, (name, workload) in enumerate(sets.items()):
            pod = workload["spec"]["template"]
            assert environment(pod)["POD"]["fieldRef"]["fieldPath"] == "metadata.name"
            given = settings_of(pod)
            assert given.stage == stage
            assert given.addresses == tuple(f"{other}.prod.svc:50060" for other in sets)
            assert given.address == f"$(POD).{name}.prod.svc:50060"
            wanted = ShardSettings.model_validate(
                {"model": "m", "stages": listed, "stage": stage}
            ).shares
            assert given.kv_shares == wanted, name
            # A stage is not ready before its neighbours are.
            assert services[name]["spec"]["clusterIP"] == "None"
            assert services[name]["spec"]["publishNotReadyAddresses"] is True
            assert workload["spec"]["serviceName"] == name
            assert workload["spec"]["podManagementPolicy"] == "Parallel"


def test_stages_scale_apart() -> None:
    manifests = render(WRITING)
    found = {
        prefix: [workload["spec"]["replicas"] for workload in sets.values()]
        for prefix, sets in by_model(manifests).items()
    }
    assert found == {"": [1, 2], "generator-": [2, 3, 2], "encoder-": [2]}
    limits = [
        workload["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        for workload in by_model(manifests)["generator-"].values()
    ]
    assert ["nvidia.com/gpu" in one for one in limits] == [True, True, False]


def test_models_are_kept_apart() -> None:
    manifests = render(WRITING)
    values = environment(pods(manifests)["demo-miaotui-gateway"])
    names = [name for pair in PREFIXES.values() for name in pair if name is not None]
    selected = {values[f"MIAOTUI_GATEWAY_{name}"].split(".")[0] for name in names}
    assert len(selected) == len(names) == 5
    for name, pod in pods(manifests).items():
        writes = "-generator-" in name
        claims = [v for v in pod["spec"]["volumes"] if "persistentVolumeClaim" in v]
        assert bool(claims) is writes, name
        model = next((v for k, v in environment(pod).items() if k.endswith("_MODEL")), None)
        assert (model == "/models/generator") is writes, name
    rings = {
        name: [r["replacement"] for r in m["spec"]["endpoints"][0]["relabelings"]]
        for name, m in of_kind(manifests, "ServiceMonitor").items()
    }
    assert rings["demo-miaotui-stage"] == ["shard", "demo", "demo"]
    assert rings["demo-miaotui-generator-stage"] == ["shard", "demo", "demo-generator"]
    assert rings["demo-miaotui-generator-tokenizer"] == ["tokenizer", "demo", "demo-generator"]
    assert rings["demo-miaotui-encoder-stage"] == ["shard", "demo", "demo-encoder"]
    # The dashboard of texts picks the ring of the model that writes, here and with Compose.
    board = json.loads((DASHBOARDS / "generation.json").read_text("utf-8"))
    wanted = set(re.findall(r'ring=~"([^"]+)"', str([p.get("targets") for p in board["panels"]])))
    assert [[bool(re.fullmatch(one, ring)) for ring in ("demo-generator", "generate", "demo", "qa")]
            for one in wanted] == [[True, True, False, False]]  # fmt: skip


def test_the_encoder_turns_texts_into_vectors(manifests: list[Manifest]) -> None:
    """Its stages, and only its, serve the task; without them the gateway names no encoder."""
    encoding = by_model(manifests).get("encoder-", {})
    values = environment(pods(manifests)["demo-miaotui-gateway"])
    assert ("MIAOTUI_GATEWAY_ENCODER_STAGES" in values) is bool(encoding)
    for sets in by_model(manifests).values():
        for name, workload in sets.items():
            given = settings_of(workload["spec"]["template"])
            assert (given.task == "embed") is (name in encoding), name
            if name in encoding:
                # Where the image has it, and what the gateway's own tokenizer belongs to.
                assert str(given.model) == "/opt/miaotui/encoder"
                assert "/opt/miaotui/encoder" in DOCKERFILE.read_text("utf-8")


def test_pods_get_the_time_that_they_take_to_stop(manifests: list[Manifest]) -> None:
    for name, pod in pods(manifests).items():
        (container,) = pod["spec"]["containers"]
        text = {k: v for k, v in environment(pod).items() if isinstance(v, str)}
        if container["args"][1] == "shard":
            given = settings_of(pod)
            seconds = given.reconnect_grace + given.drain_seconds
            # Who calls a stage is told that it drains (tests/e2e/test_replicas.py).
            assert "lifecycle" not in container, name
        elif container["args"][1] == "gateway":
            hook = container["lifecycle"]["preStop"]["exec"]["command"]
            assert hook[0] == "sleep"
            seconds = float(hook[1]) + GatewaySettings.model_fields["drain_seconds"].default
        else:
            drain = text.get(
                "MIAOTUI_TOKENIZER_DRAIN_SECONDS",
                TokenizerSettings.model_fields["drain_seconds"].default,
            )
            seconds = 2 * float(drain)  # its streams, then its server
        assert pod["spec"]["terminationGracePeriodSeconds"] >= seconds + 10, name


def test_old_tokenizers_wait_for_new_stages(manifests: list[Manifest]) -> None:
    found = {n: m for n, m in of_kind(manifests, "Deployment").items() if "tokenizer" in n}
    assert found
    for deployment in found.values():
        spec = deployment["spec"]
        assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
        assert spec["minReadySeconds"] >= 60


def test_gateways_reach_ready_pods_only(manifests: list[Manifest]) -> None:
    services = of_kind(manifests, "Service")
    values = environment(pods(manifests)["demo-miaotui-gateway"])
    checked = 0
    for prefix in by_model(manifests):
        for name, component in zip(PREFIXES[prefix], ("stage", "tokenizer"), strict=True):
            if name is None:
                continue
            host, _, port = values[f"MIAOTUI_GATEWAY_{name}"].rpartition(":")
            service, namespace, svc = host.split(".")
            assert (namespace, svc) == ("prod", "svc")
            spec = services[service]["spec"]
            assert "publishNotReadyAddresses" not in spec
            assert int(port) in [p["port"] for p in spec["ports"]]
            selector = dict(spec["selector"])
            assert selector["app.kubernetes.io/component"] == prefix + component
            assert selector.get("miaotui.io/stage", "0") == "0"
            checked += 1
    assert checked == sum(name.endswith(("TOKENIZER", "SHARD", "STAGES")) for name in values)


def test_services_budgets_and_policies_select_pods(manifests: list[Manifest]) -> None:
    templates = pods(manifests)
    selectors = {
        f"{m['kind']} {m['metadata']['name']}": m["spec"]["selector"]
        for m in manifests
        if m["kind"] == "Service"
    }
    for m in manifests:
        if m["kind"] in ("PodDisruptionBudget", "StatefulSet", "Deployment"):
            selectors[f"{m['kind']} {m['metadata']['name']}"] = m["spec"]["selector"]["matchLabels"]
    for name, selector in selectors.items():
        picked = [pod for pod in templates.values() if matches(selector, pod)]
        assert len(picked) == 1, name
    budgets = of_kind(manifests, "PodDisruptionBudget")
    assert set(budgets) == set(templates)


def test_ports_and_probes_exist(manifests: list[Manifest]) -> None:
    for name, pod in pods(manifests).items():
        (container,) = pod["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container[kind]
            where = (probe.get("tcpSocket") or probe.get("httpGet") or probe.get("grpc") or {}).get(
                "port"
            )
            if where is None:
                assert "services.rpc.probe" in probe["exec"]["command"]
                where = int(probe["exec"]["command"][-1].rpartition(":")[2])
            assert where in ports or where in ports.values(), f"{name} {kind}"
    for service in of_kind(manifests, "Service").values():
        (pod,) = [p for p in pods(manifests).values() if matches(service["spec"]["selector"], p)]
        known = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= known


def test_pods_have_no_rights(manifests: list[Manifest]) -> None:
    accounts = of_kind(manifests, "ServiceAccount")
    for name, pod in pods(manifests).items():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["serviceAccountName"] in accounts, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        (container,) = spec["containers"]
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True, name
        assert security["allowPrivilegeEscalation"] is False, name
        assert security["capabilities"] == {"drop": ["ALL"]}, name
        assert "memory" in container["resources"]["limits"], name
    assert all(a["automountServiceAccountToken"] is False for a in accounts.values())


def allowed(manifests: list[Manifest], source: Manifest, target: Manifest) -> set[str | int]:
    """The ports on which policies let one pod call another: egress and ingress agree."""

    def policy(pod: Manifest) -> Manifest:
        (found,) = [
            m["spec"]
            for m in of_kind(manifests, "NetworkPolicy").values()
            if matches(m["spec"]["podSelector"]["matchLabels"], pod)
        ]
        assert set(found["policyTypes"]) == {"Ingress", "Egress"}
        return found  # type: ignore[no-any-return]

    def peers(rule: Manifest, key: str, pod: Manifest) -> bool:
        return any(
            "podSelector" in peer and matches(peer["podSelector"]["matchLabels"], pod)
            for peer in rule.get(key, [])
        )

    (container,) = target["spec"]["containers"]
    numbers = {port["name"]: port["containerPort"] for port in container["ports"]}
    into = {
        numbers[port["port"]]
        for rule in policy(target)["ingress"]
        if peers(rule, "from", source)
        for port in rule["ports"]
    }
    out = {
        port["port"]
        for rule in policy(source)["egress"]
        if peers(rule, "to", target)
        for port in rule["ports"]
    }
    return into & out


def test_only_the_hops_that_exist_are_open(manifests: list[Manifest]) -> None:
    templates = pods(manifests)
    hops: dict[tuple[str, str], set[str | int]] = {}
    for prefix, sets in by_model(manifests).items():
        stages = list(sets)
        if PREFIXES[prefix][1] is not None:
            hops["demo-miaotui-gateway", f"demo-miaotui-{prefix}tokenizer"] = {50051}
        # Gateway and stage 0 look at all stages; activations go round the ring.
        looks = [("demo-miaotui-gateway", stage) for stage in stages]
        looks += [(stages[0], stage) for stage in stages[1:]]
        ring = zip(stages, stages[1:] + stages[:1], strict=True)
        hops |= {hop: {50060} for hop in (*looks, *ring) if hop[0] != hop[1]}
    open_hops = {
        (a, b): ports
        for a, source in templates.items()
        for b, target in templates.items()
        if (ports := allowed(manifests, source, target))
    }
    assert open_hops == hops


def test_secrets_are_only_in_secrets() -> None:
    manifests = render(EVERYTHING)
    secrets = of_kind(manifests, "Secret")
    keys = {(n, key) for n, s in secrets.items() for key in s.get("data") or s["stringData"]}
    values = environment(pods(manifests)["demo-miaotui-gateway"])
    for name in ("REDIS_URL", "MIAOTUI_GATEWAY_CACHE_SECRET"):
        reference = values[name]["secretKeyRef"]
        assert (reference["name"], reference["key"]) in keys
    others = [m for m in manifests if m["kind"] != "Secret"]
    assert "password" not in str(others)
    first, second = (
        of_kind(render({}), "Secret")["demo-miaotui-cache"]["data"]["cache-secret"] for _ in "12"
    )
    assert first != second


def test_autoscalers_have_bounds_and_figures_of_their_own() -> None:
    scaled = {"enabled": True}
    values = {
        **EVERYTHING,
        "stages": {
            **EVERYTHING["stages"],
            "each": {"1": {"replicas": 3, "maxReplicas": 8, "queuedPerReplica": 32}},
        },
        "generator": {
            "enabled": True,
            "stages": {"autoscaling": scaled},
            "tokenizer": {"autoscaling": scaled},
        },
        "encoder": {"stages": {"autoscaling": {**scaled, "queuedPerReplica": 512}}},
    }
    manifests = render(values)
    scalers = of_kind(manifests, "HorizontalPodAutoscaler")
    workloads = of_kind(manifests, "StatefulSet", "Deployment")
    assert set(scalers) == set(workloads)
    assert all(name == m["spec"]["scaleTargetRef"]["name"] for name, m in scalers.items())
    # What an autoscaler sets, the chart must not set back.
    assert not any("replicas" in workload["spec"] for workload in workloads.values())
    bounds, rings = {}, {}
    for name, scaler in scalers.items():
        spec = scaler["spec"]
        if "stage-" in name:
            (metric,) = (one["external"] for one in spec["metrics"])
            rings[name] = metric["metric"]["selector"]["matchLabels"]["ring"]
            bounds[name.removeprefix("demo-miaotui-")] = (
                *(spec["minReplicas"], spec["maxReplicas"], metric["target"]["averageValue"]),
            )
    assert bounds == {
        "stage-0": (2, 4, "64"),
        "stage-1": (3, 8, "32"),
        "stage-2": (2, 4, "64"),
        "generator-stage-0": (1, 4, "64"),
        "generator-stage-1": (1, 4, "64"),
        "encoder-stage-0": (1, 4, "512"),
    }
    monitors = of_kind(manifests, "ServiceMonitor")
    for name, ring in rings.items():
        monitor = monitors[name.rpartition("-")[0]]
        relabelings = monitor["spec"]["endpoints"][0]["relabelings"]
        assert {"targetLabel": "ring", "replacement": ring} in relabelings


def test_gpus_and_tls_reach_the_pods() -> None:
    manifests = render(EVERYTHING)
    for name, pod in pods(manifests).items():
        values = environment(pod)
        (container,) = pod["spec"]["containers"]
        assert values["MIAOTUI_TLS_DIR"] == "/tls"
        assert "/tls" in [mount["mountPath"] for mount in container["volumeMounts"]]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}, name
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        assert gpus == (1 if "-stage-" in name else None), name
        if "-stage-" in name:
            assert values["MIAOTUI_SHARD_DEVICE"] == "cuda"
        if "-miaotui-stage-" in name:
            assert values["MIAOTUI_SHARD_QUEUE_SEQUENCES"] == "4096"
            assert values["MIAOTUI_SHARD_KV_CACHE_BYTES"] == "8589934592"


def test_a_digest_goes_before_a_tag() -> None:
    digest = f"sha256:{'ab' * 32}"
    for image, wanted in (
        ({"tag": "1.2"}, "miaotui:1.2"),
        ({"tag": "1.2", "digest": digest}, f"miaotui@{digest}"),
    ):
        found = pods(render({"image": image})).values()
        assert {pod["spec"]["containers"][0]["image"] for pod in found} == {wanted}


def test_notes() -> None:
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render({}, name="demo", namespace="prod")
    (notes,) = [text for path, text in files.items() if path.endswith("NOTES.txt")]
    assert "svc/demo-miaotui 8080:80" in notes
    assert not re.search(r"<no value>|%!", str(files))


def test_settings_of_a_stage_are_checked_by_the_service_itself() -> None:
    """So that the checks above mean something."""
    with pytest.raises(ValidationError):
        ShardSettings.model_validate({"model": "m", "stages": "a:1", "stage": "1"})
