"""Which metrics an expression of PromQL asks for, and which ones the services have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import promql_parser
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.compose import ROOT

# What Prometheus adds when it scrapes, and the configuration's own.
SCRAPED = {"job", "instance", "ring", "release", "namespace"}
_VARIABLES = {"$__rate_interval": "1m", "$__interval": "1m", "$__range": "1h"}
_INSTRUMENT = re.compile(
    r"\b(?:create_(counter|histogram|up_down_counter|observable_gauge|observable_counter)|gauge)"
    r'\(\s*"([\w.]+)"(.*?)\)',
    re.DOTALL,
)
# The gateway's own, which cost less.
_LEAN = re.compile(r'\b(Counts|Level|Durations)\(\s*\w+,\s*(?:\*\()?"([\w.]+)"')
_KINDS = {"Counts": "counter", "Level": "up_down_counter", "Durations": "histogram"}


@dataclass(frozen=True)
class Use:
    """A metric as an expression uses it, with the labels that it must have."""

    metric: str
    labels: frozenset[str]


def parse(expression: str) -> Any:
    """The syntax tree; raises `ValueError` for what is not PromQL."""
    for name, value in _VARIABLES.items():
        expression = expression.replace(name, value)
    return promql_parser.parse(expression)


def uses(expression: str) -> list[Use]:
    """Every metric that an expression reads, and its labels: matched, or grouped by."""
    found: list[Use] = []

    def visit(node: Any, grouped: frozenset[str]) -> None:
        match type(node).__name__:
            case "VectorSelector":
                matched = {matcher.name for matcher in node.matchers.matchers}
                assert node.name, f"a selector without a name in {expression}"
                found.append(Use(node.name, frozenset(matched) | grouped))
            case "MatrixSelector":
                visit(node.vector_selector, grouped)
            case "AggregateExpr":
                by = frozenset(node.modifier.labels) if node.modifier else frozenset()
                # Only what the inner aggregation keeps can be grouped by outside of it.
                visit(node.expr, by)
            case "Call":
                for argument in node.args:
                    visit(argument, grouped)
            case "BinaryExpr":
                visit(node.lhs, grouped)
                visit(node.rhs, grouped)
            case "ParenExpr" | "UnaryExpr" | "SubqueryExpr":
                visit(node.expr, grouped)

    visit(parse(expression), frozenset())
    return found


def exported(text: str) -> dict[str, set[str]]:
    """The samples of a Prometheus page, and the labels of each."""
    samples: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    return samples


def instruments() -> Iterator[str]:
    """The names under which Prometheus shows every instrument in the source."""
    for folder in ("gateway", "miaotui", "services"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text("utf-8")
            for kind, name, rest in _INSTRUMENT.findall(text):
                seconds = re.search(r'(?:unit=|,\s*)"s"', rest)
                yield from _shown(kind, name, seconds=seconds is not None)
            for kind, name in _LEAN.findall(text):
                yield from _shown(_KINDS[kind], name, seconds=kind == "Durations")


def _shown(kind: str, name: str, *, seconds: bool) -> Iterator[str]:
    base = name.replace(".", "_") + ("_seconds" if seconds else "")
    if kind == "histogram":
        yield from (f"{base}_{part}" for part in ("bucket", "sum", "count"))
    else:
        yield f"{base}_total" if kind in ("counter", "observable_counter") else base
