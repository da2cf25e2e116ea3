"""The Helm chart: rendered by Helm itself, checked against Kubernetes' own schemas."""

from __future__ import annotations

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
from tests.deploy.chart import (
    CHART,
    EVERYTHING,
    VALUES,
    Manifest,
    environment,
    matches,
    of_kind,
    pods,
    render,
    settings_of,
)
from tests.deploy.test_compose import OPEN_TELEMETRY, SETTINGS

# The oldest that the chart takes, and a newer one.
KUBERNETES = ("1.28", "1.37")
# Not of Kubernetes itself.
CUSTOM = {"ServiceMonitor"}


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
        {"transcriber": {"stages": {"count": 0}}},
        {"transcriber": {"layers": "0-3"}},
        {"captioner": {"model": {"path": "models/relative"}}},
        {"encoder": {"stages": {"count": 0}}},
        {"encoder": {"model": {"path": "/models/other"}}},
        {"stages": {"layers": "0-3;3-6"}},
        {"stages": {"dtype": "float8"}},
        {"redis": {"url": "http://redis"}},
        {"tls": {"https": True}},
        {"keys": {"secret": "s"}},
        {"gateway": {"ingress": {"enabled": True}}},
        {"gateway": {"documents": {"url": "postgresql://user:password@host/database"}}},
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


def notes_of(values: dict[str, Any]) -> str:
    """What Helm prints after an installation."""
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values, name="demo", namespace="prod")
    assert not re.search(r"<no value>|%!", str(files))
    (notes,) = [text for path, text in files.items() if path.endswith("NOTES.txt")]
    return str(notes)


def test_notes() -> None:
    notes = notes_of({})
    assert "svc/demo-miaotui 8080:80" in notes
    assert ": 2 stage(s), 1 stage(s) of the encoder, 2 gateway(s)." in notes


@pytest.mark.parametrize(
    ("gateway", "warning"),
    [
        ({}, "gone with the gateway's pod, and each gateway has others."),
        ({"replicas": 1}, "gone with the gateway's pod."),
        ({"documents": {"volume": {"hostPath": {"path": "/d"}}}}, "do not share documents"),
        ({"documents": {"volume": {"hostPath": {"path": "/d"}}}, "replicas": 1}, ""),
        ({"documents": {"existingSecret": "s"}}, ""),
    ],
    ids=str,
)
def test_notes_warn_of_documents_that_get_lost(gateway: dict[str, Any], warning: str) -> None:
    notes = notes_of({"gateway": gateway})
    assert ("gateway.documents" in notes) == bool(warning)
    assert warning in notes


def test_gateways_share_a_database_of_documents() -> None:
    manifests = render(EVERYTHING)
    pod = pods(manifests)["demo-miaotui-gateway"]
    reference = environment(pod)["MIAOTUI_GATEWAY_DOCUMENTS"]["secretKeyRef"]
    assert reference == {"name": "documents-database", "key": "url"}
    (container,) = pod["spec"]["containers"]
    assert "documents" not in [mount["name"] for mount in container["volumeMounts"]]
    assert "documents" not in [volume["name"] for volume in pod["spec"]["volumes"]]
    policy = of_kind(manifests, "NetworkPolicy")["demo-miaotui-gateway"]["spec"]
    out = [rule for rule in policy["egress"] if {"port": 6432, "protocol": "TCP"} in rule["ports"]]
    assert [rule["to"] for rule in out] == [[{"ipBlock": {"cidr": "10.0.0.0/8"}}]]
    with_volume = pods(render({}))["demo-miaotui-gateway"]
    assert environment(with_volume)["MIAOTUI_GATEWAY_DOCUMENTS"] == "/documents"


def test_stage_0_alone_reaches_the_redis_of_passages() -> None:
    manifests = render(EVERYTHING)
    policies = of_kind(manifests, "NetworkPolicy")
    port = {"port": 6380, "protocol": "TCP"}
    keys = {"URL": "url", "SECRET": "secret", "ENCRYPTION_KEY": "encryption-key"}
    names = [name for name in pods(manifests) if "stage-" in name]
    assert "demo-miaotui-encoder-stage-0" in names
    for name in names:
        given = {k: v for k, v in environment(pods(manifests)[name]).items() if "PASSAGE" in k}
        out = [r["to"] for r in policies[name]["spec"]["egress"] if port in r.get("ports", [])]
        if name == "demo-miaotui-stage-0":
            assert given == {
                f"MIAOTUI_SHARD_PASSAGE_REDIS_{part}": {
                    "secretKeyRef": {"name": "passages", "key": key}
                }
                for part, key in keys.items()
            }
            assert out == [[{"ipBlock": {"cidr": "10.1.0.0/16"}}]]
        else:
            assert not given, name
            assert not out, name
    plain = environment(pods(render({}))["demo-miaotui-stage-0"])
    assert not [variable for variable in plain if "PASSAGE" in variable]


def test_settings_of_a_stage_are_checked_by_the_service_itself() -> None:
    """So that the checks above mean something."""
    with pytest.raises(ValidationError):
        ShardSettings.model_validate({"model": "m", "stages": "a:1", "stage": "1"})
