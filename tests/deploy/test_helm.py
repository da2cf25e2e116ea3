"""The Helm chart: rendered by Helm itself, checked against Kubernetes' own schemas."""

from __future__ import annotations

import re
from typing import Any

import helm_python
import kubernetes_validate
import pytest
from pydantic import ValidationError

from miaotui.cli.serve import variable
from services.shard.settings import ShardSettings
from tests.deploy.compose import ROOT, read_yaml
from tests.deploy.test_compose import OPEN_TELEMETRY, SETTINGS

CHART = ROOT / "deploy" / "helm" / "miaotui"
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
        "settings": {"queue_sequences": 4096},
        "nodeSelector": {"gpu": "yes"},
        "tolerations": [{"operator": "Exists"}],
        "autoscaling": {"enabled": True},
    },
    "tokenizer": {"autoscaling": {"enabled": True}},
    "gateway": {
        "autoscaling": {"enabled": True},
        "ingress": {"enabled": True, "host": "qa.example", "tlsSecretName": "web"},
    },
    "redis": {"url": "rediss://:password@redis.example:6379/0"},
    "tls": {"secretName": "certificates", "https": True},
    "telemetry": {"otlpEndpoint": "collector.example:4317", "serviceMonitor": {"enabled": True}},
    "networkPolicy": {"gatewayFrom": [{"namespaceSelector": {"matchLabels": {"team": "web"}}}]},
    "priorityClassName": "high",
    "podAnnotations": {"a": "b"},
}
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": EVERYTHING,
    "one stage": {"stages": {"count": 1}},
}
Manifest = dict[str, Any]


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
        {"stages": {"count": 0}},
        {"stages": {"layer": "0-3"}},
        {"stages": {"layers": "0-3;3-6"}},
        {"stages": {"dtype": "float8"}},
        {"redis": {"url": "http://redis"}},
        {"tls": {"https": True}},
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
        known |= OPEN_TELEMETRY | {"PIPELINE", "REDIS_URL"}
        assert set(environment(pod)) <= known, name


def test_stages_of_a_pipeline_find_each_other(manifests: list[Manifest]) -> None:
    sets = of_kind(manifests, "StatefulSet")
    services = of_kind(manifests, "Service")
    for name, workload in sets.items():
        pod = workload["spec"]["template"]
        values = environment(pod)
        label = values["PIPELINE"]["fieldRef"]["fieldPath"]
        assert label == "metadata.labels['apps.kubernetes.io/pod-index']"
        text = {k: v for k, v in values.items() if isinstance(v, str)}
        given = ShardSettings.model_validate(
            {k.removeprefix("MIAOTUI_SHARD_").lower(): v for k, v in text.items() if "SHARD" in k}
        )
        assert len(given.addresses) == len(sets)
        assert given.address.startswith(f"{name}-$(PIPELINE).{name}.prod.svc:")
        for address in given.addresses:
            service = address.split(".")[1]
            assert services[service]["spec"]["clusterIP"] == "None"
            # A stage is not ready before its neighbours are.
            assert services[service]["spec"]["publishNotReadyAddresses"] is True
            assert sets[service]["spec"]["serviceName"] == service
            assert sets[service]["spec"]["podManagementPolicy"] == "Parallel"


def test_gateways_reach_ready_pods_only(manifests: list[Manifest]) -> None:
    services = of_kind(manifests, "Service")
    values = environment(pods(manifests)["demo-miaotui-gateway"])
    for name, component in (("TOKENIZER", "tokenizer"), ("SHARD", "stage")):
        host, _, port = values[f"MIAOTUI_GATEWAY_{name}"].rpartition(":")
        service, namespace, svc = host.split(".")
        assert (namespace, svc) == ("prod", "svc")
        spec = services[service]["spec"]
        assert "publishNotReadyAddresses" not in spec
        assert int(port) in [p["port"] for p in spec["ports"]]
        assert spec["selector"]["app.kubernetes.io/component"] == component


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
    stages = sorted(name for name in templates if "-stage-" in name)
    hops = {
        ("demo-miaotui-gateway", "demo-miaotui-tokenizer"): {50051},
        ("demo-miaotui-gateway", stages[0]): {50060},
    }
    if len(stages) > 1:
        ring = zip(stages, stages[1:] + stages[:1], strict=True)
        hops |= {hop: {50060} for hop in ring}
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


def test_autoscaling_keeps_pipelines_whole() -> None:
    manifests = render(EVERYTHING)
    scalers = of_kind(manifests, "HorizontalPodAutoscaler")
    workloads = of_kind(manifests, "StatefulSet", "Deployment")
    assert set(scalers) == set(workloads)
    # What an autoscaler sets, the chart must not set back.
    assert not any("replicas" in workload["spec"] for workload in workloads.values())
    stages = [scaler["spec"] for name, scaler in scalers.items() if "-stage-" in name]
    for spec in stages:
        assert {k: spec[k] for k in ("minReplicas", "maxReplicas", "metrics")} == {
            k: stages[0][k] for k in ("minReplicas", "maxReplicas", "metrics")
        }


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
            assert values["MIAOTUI_SHARD_QUEUE_SEQUENCES"] == "4096"


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
