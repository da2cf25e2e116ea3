"""The dashboards and rules of this repository, and the PromQL in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.deploy.compose import ROOT, read_yaml

FOLDER = ROOT / "deploy" / "observability"
RULES = sorted((FOLDER / "prometheus" / "rules").glob("*.yml"))
DASHBOARDS = sorted((FOLDER / "grafana" / "dashboards").glob("*.json"))


def rules() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every rule with the file that it is in."""
    for path in RULES:
        (document,) = read_yaml(path.read_text("utf-8"))
        for group in document["groups"]:
            for rule in group["rules"]:
                yield path.name, rule


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every panel but the rows."""
    return (panel for panel in board["panels"] if panel["type"] != "row")


def expressions() -> list[tuple[str, str]]:
    """Every PromQL expression with where it stands."""
    found = [
        (f"{name}: {rule.get('alert') or rule['record']}", rule["expr"]) for name, rule in rules()
    ]
    for path in DASHBOARDS:
        for panel in panels(json.loads(path.read_text("utf-8"))):
            found += [(f"{path.name}: {panel['title']}", t["expr"]) for t in panel["targets"]]
    return found
