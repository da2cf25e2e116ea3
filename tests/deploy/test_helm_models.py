"""The chart's models: each with stages and a tokenizer that find each other, and no one else."""

from __future__ import annotations

from gateway.settings import GatewaySettings
from services.shard.settings import ShardSettings
from services.tokenizer.settings import TokenizerSettings
from tests.deploy.chart import (
    ALL,
    EVERYTHING,
    PREFIXES,
    Manifest,
    by_model,
    environment,
    matches,
    of_kind,
    pods,
    render,
    settings_of,
)
from tests.deploy.compose import ROOT

DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"


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
    manifests = render(ALL)
    found = {
        prefix: [workload["spec"].get("replicas") for workload in sets.values()]
        for prefix, sets in by_model(manifests).items()
    }
    assert found == {
        "": [1, 2],
        "generator-": [2, 3, 2],
        # Its autoscalers set them.
        "transcriber-": [None, None],
        "captioner-": [2],
        "encoder-": [2],
    }
    gpus = {
        prefix: [
            "nvidia.com/gpu"
            in workload["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
            for workload in sets.values()
        ]
        for prefix, sets in by_model(manifests).items()
    }
    assert gpus == {
        "": [False, False],
        "generator-": [True, True, False],
        "transcriber-": [True, False],
        "captioner-": [False],
        "encoder-": [False],
    }


def test_models_are_kept_apart() -> None:
    manifests = render(ALL)
    values = environment(pods(manifests)["demo-miaotui-gateway"])
    names = [name for pair in PREFIXES.values() for name in pair if name is not None]
    selected = {values[f"MIAOTUI_GATEWAY_{name}"].split(".")[0] for name in names}
    assert len(selected) == len(names) == 9
    volumes = {
        "generator": ("/models/generator", {"persistentVolumeClaim": {"claimName": "writer"}}),
        "transcriber": ("/models/transcriber", {"persistentVolumeClaim": {"claimName": "whisper"}}),
        "captioner": ("/models/vit", {"hostPath": {"path": "/data/vit"}}),
    }
    seen = dict.fromkeys(volumes, 0)
    for name, pod in pods(manifests).items():
        mine = next((one for one in volumes if f"-{one}-" in name), None)
        model = next((v for k, v in environment(pod).items() if k.endswith("_MODEL")), None)
        given = [v for v in pod["spec"]["volumes"] if v["name"] == "models"]
        if mine is None:
            assert not given, name
            assert not str(model).startswith("/models/"), name
            continue
        path, volume = volumes[mine]
        assert given == [{"name": "models", **volume}], name
        assert model == path, name
        seen[mine] += 1
    assert seen == {"generator": 4, "transcriber": 3, "captioner": 2}


def test_monitors_name_the_ring_of_each_model() -> None:
    monitors = of_kind(render(ALL), "ServiceMonitor")
    rings = {
        name.removeprefix("demo-miaotui-"): [
            r["replacement"] for r in m["spec"]["endpoints"][0]["relabelings"]
        ]
        for name, m in monitors.items()
    }
    # job, release and ring.
    expected = {
        "gateway": ["gateway", "demo", "demo"],
        "stage": ["shard", "demo", "demo"],
        "tokenizer": ["tokenizer", "demo", "demo"],
        "encoder-stage": ["shard", "demo", "demo-encoder"],
    }
    for model in ("generator", "transcriber", "captioner"):
        expected[f"{model}-stage"] = ["shard", "demo", f"demo-{model}"]
        expected[f"{model}-tokenizer"] = ["tokenizer", "demo", f"demo-{model}"]
    assert rings == expected


def test_models_beside_the_first_one_are_off_at_first() -> None:
    assert set(by_model(render({}))) == {"", "encoder-"}
    values = environment(pods(render({}))["demo-miaotui-gateway"])
    names = ("GENERATOR", "TRANSCRIBER", "CAPTIONER")
    assert not [key for key in values if any(name in key for name in names)]


def test_tokenizers_have_room_for_the_files_that_they_read() -> None:
    """As many as a gateway reads at once, and what a tokenizer takes anyway."""
    manifests = render(ALL)
    files = GatewaySettings.model_fields["max_media_requests"].default
    most = GatewaySettings.model_fields["max_sound_bytes"].default
    assert most <= TokenizerSettings.model_fields["max_file_bytes"].default
    for model in ("transcriber", "captioner"):
        (container,) = pods(manifests)[f"demo-miaotui-{model}-tokenizer"]["spec"]["containers"]
        limit = container["resources"]["limits"]["memory"]
        assert limit.endswith("Gi")
        assert int(limit.removesuffix("Gi")) << 30 >= files * most + (1 << 30), model
    # At the gateway, they pass through the disk.
    (tmp,) = [
        v for v in pods(manifests)["demo-miaotui-gateway"]["spec"]["volumes"] if v["name"] == "tmp"
    ]
    assert int(tmp["emptyDir"]["sizeLimit"].removesuffix("Gi")) << 30 >= files * most


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
        "transcriber": {
            "enabled": True,
            "stages": {"count": 1, "autoscaling": {**scaled, "queuedPerReplica": 8}},
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
        "transcriber-stage-0": (1, 4, "8"),
        "encoder-stage-0": (1, 4, "512"),
    }
    monitors = of_kind(manifests, "ServiceMonitor")
    for name, ring in rings.items():
        monitor = monitors[name.rpartition("-")[0]]
        relabelings = monitor["spec"]["endpoints"][0]["relabelings"]
        assert {"targetLabel": "ring", "replacement": ring} in relabelings
