"""Dashboards, rules and the collector: valid, and about metrics that really exist."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.boards import DASHBOARDS, FOLDER, expressions, panels, rules
from tests.deploy.compose import BESIDE, load, read_yaml, variant
from tests.deploy.conftest import Stacks
from tests.deploy.metrics import SCRAPED, exported, instruments, parse, uses
from tests.deploy.stack import SERVICES, Stack

# Exported only where a model writes, which these services do not: looked up in the source.
GENERATION = ("miaotui_gateway_generation", "miaotui_generate_", "miaotui_kv_")
PROMETHEUS_OWN = {"up"}
promtool = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    promtool is None, reason="promtool is not installed (apt-get install prometheus)"
)


def test_expressions_are_promql() -> None:
    assert len(expressions()) > 60
    for where, expression in expressions():
        try:
            parse(expression)
        except ValueError as error:
            pytest.fail(f"{where}: {error}")
    with pytest.raises(ValueError, match=r".+"):
        parse("sum(rate(x[5m]) by (a)")


async def exercise(stack: Stack) -> None:
    """Lets every metric appear that appears only with what it counts."""
    async with httpx.AsyncClient(trust_env=False, timeout=60.0) as client:
        url = f"{stack.url}/v1/qa"
        question = {"question": "Where is it?", "context": "It is in the harbour."}
        for _ in range(2):
            assert (await client.post(url, json=question)).status_code == 200
        assert (await client.post(url, json={"question": ""})).status_code == 422
        # Redis hangs for a moment, which costs a look-up.
        stack.redis.signal(signal.SIGSTOP)
        try:
            other = {**question, "context": "It is on the mountain."}
            assert (await client.post(url, json=other)).status_code == 200
        finally:
            stack.redis.signal(signal.SIGCONT)


async def test_every_metric_in_use_is_exported(stacks: Stacks) -> None:
    await exercise(stacks.plain)
    live: dict[str, set[str]] = {}
    for service in SERVICES:
        for name, labels in exported(stacks.plain.metrics(service)).items():
            live.setdefault(name, set()).update(labels)
    recorded = {rule["record"] for _, rule in rules() if "record" in rule}
    declared = set(instruments())
    # The names in the source are made into Prometheus' by our own rule: it must be the exporter's.
    ours = {name for name in live if name.startswith("miaotui_") and not name.endswith("_created")}
    assert len(ours) > 20
    assert not ours - declared

    missing, unlabelled, checked = set(), set(), 0
    for where, expression in expressions():
        for use in uses(expression):
            if use.metric in recorded | PROMETHEUS_OWN:
                continue
            if use.metric not in live:
                rare = use.metric == "miaotui_stage_dropped_total"
                if use.metric in declared and (rare or use.metric.startswith(GENERATION)):
                    continue
                missing.add(f"{where}: {use.metric}")
                continue
            wrong = use.labels - live[use.metric] - SCRAPED
            if wrong:
                unlabelled.add(f"{where}: {use.metric} has no {sorted(wrong)}")
            checked += 1
    assert not missing, "\n".join(sorted(missing))
    assert not unlabelled, "\n".join(sorted(unlabelled))
    assert checked > 60


def test_uses_are_found() -> None:
    found = uses('sum by (a) (rate(x_total{b="1"}[5m])) / on (a) histogram_quantile(0.9, y_bucket)')
    assert [(use.metric, use.labels) for use in found] == [
        ("x_total", {"a", "b"}),
        ("y_bucket", frozenset()),
    ]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_are_well_formed(path: Path) -> None:
    board = json.loads(path.read_text("utf-8"))
    (sources,) = read_yaml(
        (FOLDER / "grafana/provisioning/datasources/datasources.yml").read_text("utf-8")
    )
    known = {source["uid"] for source in sources["datasources"]}
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        own = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= 24, panel["title"]
        assert not own & cells, f"{panel['title']} lies on another panel"
        cells |= own
    for panel in panels(board):
        assert panel["datasource"]["uid"] in known
        assert {target["datasource"]["uid"] for target in panel["targets"]} <= known
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_dashboards_have_names_of_their_own_and_are_provisioned() -> None:
    boards = [json.loads(path.read_text("utf-8")) for path in DASHBOARDS]
    assert len({board["uid"] for board in boards}) == len(boards) >= 4
    (providers,) = read_yaml(
        (FOLDER / "grafana/provisioning/dashboards/dashboards.yml").read_text("utf-8")
    )
    path = providers["providers"][0]["options"]["path"]
    grafana = load()["services"]["grafana"]
    assert f"./deploy/observability/grafana/dashboards:{path}:ro" in grafana["volumes"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).name in {path.name for path in DASHBOARDS}


def test_alerts_say_what_to_do() -> None:
    alerts = [rule for _, rule in rules() if "alert" in rule]
    assert len(alerts) >= 10
    for alert in alerts:
        assert alert["labels"]["severity"] in ("page", "ticket"), alert["alert"]
        assert {"summary", "description"} <= set(alert["annotations"]), alert["alert"]
        assert alert["for"], alert["alert"]


def test_prometheus_scrapes_what_compose_starts() -> None:
    (config,) = read_yaml((FOLDER / "prometheus" / "prometheus.yml").read_text("utf-8"))
    project = load(**variant(*BESIDE))["services"]
    always = set(load()["services"])
    ports = {
        name: port
        for name, service in project.items()
        for key, port in service.get("environment", {}).items()
        if key.endswith("_METRICS_PORT")
    }
    targets: set[str] = set()
    sometimes: dict[str, str] = {}
    for job in config["scrape_configs"]:
        for static in job["static_configs"]:
            targets |= set(static["targets"])
        for dns in job.get("dns_sd_configs", []):
            for name in dns["names"]:
                sometimes[name] = ring_of(name, job["relabel_configs"])
                assert ports[name] == str(dns["port"])
                assert job["job_name"] == project[name]["command"][1]
    expected = {f"{name}:{port}" for name, port in ports.items() if name in always}
    assert targets == expected | {"gateway:8080", "collector:8888", "localhost:9090"}
    # Each model's services have its ring, and those of the static targets keep theirs.
    assert sometimes == {n: n.rpartition("-")[0] for n in project if n not in always}
    assert set(sometimes.values()) == set(BESIDE)
    assert ring_of("", config["scrape_configs"][1]["relabel_configs"]) == ""


def ring_of(name: str, relabelings: list[dict[str, Any]]) -> str:
    """The ring that a target gets which Prometheus found under a name; empty: the one it had."""
    (rule,) = relabelings
    assert (rule["source_labels"], rule["target_label"]) == (["__meta_dns_name"], "ring")
    assert not {"action", "replacement"} & set(rule)
    found = re.fullmatch(rule["regex"], name)
    return "" if found is None else found[1]


def test_the_dashboard_of_texts_has_the_rings_of_all_models_that_write() -> None:
    board = json.loads((FOLDER / "grafana/dashboards/generation.json").read_text("utf-8"))
    texts = [target["expr"] for panel in panels(board) for target in panel["targets"]]
    patterns = {found for text in texts for found in re.findall(r'ring=~"([^"]+)"', text)}
    assert patterns
    for pattern in patterns:
        for ring in (*BESIDE, *(f"demo-{name}" for name in BESIDE)):
            assert re.fullmatch(pattern, ring), ring
        for ring in ("qa", "demo", "encoder", "demo-encoder"):
            assert not re.fullmatch(pattern, ring), ring


def test_the_collector_uses_what_it_configures() -> None:
    (config,) = read_yaml((FOLDER / "collector" / "config.yaml").read_text("utf-8"))
    project = load()["services"]
    for pipeline in config["service"]["pipelines"].values():
        for kind, used in pipeline.items():
            assert set(used) == set(config[kind]), kind
        # What limits memory comes first, what batches last.
        assert pipeline["processors"][0] == "memory_limiter"
        assert pipeline["processors"][-1] == "batch"
    assert set(config["service"]["extensions"]) == set(config["extensions"])
    port = config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].rpartition(":")[2]
    for name in SERVICES:
        endpoint = project[name]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"]
        assert endpoint == f"http://collector:{port}"
    host = config["exporters"]["otlp/jaeger"]["endpoint"].partition(":")[0]
    assert set(project[host]["networks"]) & set(project["collector"]["networks"])


def run_promtool(*arguments: str | Path) -> None:
    """Runs promtool; fails with what it says."""
    assert promtool is not None
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_takes_its_configuration() -> None:
    run_promtool("check", "config", FOLDER / "prometheus" / "prometheus.yml")


@needs_promtool
def test_alerts_fire_when_they_should() -> None:
    run_promtool("test", "rules", FOLDER / "prometheus" / "rules_test.yml")
