"""What a run has shown, as text and as JSON."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from tests.soak.judge import (
    OK,
    WRONG,
    Fault,
    Growth,
    Life,
    Outcome,
    Rules,
    growth,
    judge_faults,
    judge_lives,
    judge_requests,
)

MIB = 1024 * 1024
T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """All that is told of a run."""

    seed: int
    seconds: float
    tls: bool
    operations: list[dict[str, Any]]
    faults: list[dict[str, Any]]
    services: list[dict[str, Any]]
    violations: list[str]

    def json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def make_report(
    *,
    seed: int,
    seconds: float,
    tls: bool,
    outcomes: Sequence[Outcome],
    faults: Sequence[Fault],
    lives: Sequence[Life],
    rules: Rules,
    found: Sequence[str] = (),
) -> Report:
    """Judges a run. `found`: what was seen to be wrong while it ran."""
    violations = [
        *found,
        *judge_requests(outcomes, faults, rules),
        *judge_faults(faults, rules),
        *judge_lives(lives, rules),
    ]
    return Report(
        seed,
        round(seconds, 1),
        tls,
        [
            _operation(name, some)
            for name, some in _grouped(outcomes, lambda one: one.operation).items()
        ],
        [
            _faults(name, some, outcomes)
            for name, some in _grouped(faults, lambda one: one.name).items()
        ],
        [
            _service(name, some, rules)
            for name, some in _grouped(lives, lambda one: one.service).items()
        ],
        violations,
    )


def _grouped(items: Iterable[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(sorted(groups.items()))


def _operation(name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    seconds = sorted(one.seconds for one in outcomes if one.status == OK)
    failed = Counter(one.status for one in outcomes if one.status not in (OK, WRONG))
    return {
        "operation": name,
        "count": len(outcomes),
        "right": len(seconds),
        "wrong": sum(one.status == WRONG for one in outcomes),
        "failed": dict(failed.most_common()),
        "p50_seconds": _at(seconds, 0.5),
        "p99_seconds": _at(seconds, 0.99),
        "longest_seconds": round(max((one.seconds for one in outcomes), default=0.0), 3),
    }


def _at(ordered: Sequence[float], share: float) -> float | None:
    return round(ordered[int(share * (len(ordered) - 1))], 3) if ordered else None


def _faults(name: str, faults: Sequence[Fault], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    met = [one for one in outcomes if any(fault.touches(one) for fault in faults)]
    failed = Counter(one.status for one in met if one.status not in (OK, WRONG))
    recoveries = [one.recovery_seconds for one in faults if one.recovery_seconds is not None]
    return {
        "fault": name,
        "count": len(faults),
        "in_flight": sum(fault.in_flight for fault in faults),
        "met": len(met),
        "right": sum(one.status == OK for one in met),
        "wrong": sum(one.status == WRONG for one in met),
        "failed": dict(failed.most_common()),
        "recovery_p50_seconds": round(statistics.median(recoveries), 2) if recoveries else None,
        "recovery_max_seconds": round(max(recoveries), 2) if recoveries else None,
        "never_recovered": len(faults) - len(recoveries),
    }


def _service(name: str, lives: Sequence[Life], rules: Rules) -> dict[str, Any]:
    grown = [one for life in lives if (one := growth(life, rules)) is not None]
    longest = max(grown, key=lambda one: one.seconds, default=None)
    last = lives[-1].samples[-1]
    return {
        "service": name,
        "lives": len(lives),
        "resident_mib": round(last.resident / MIB),
        "proportional_mib": round(last.proportional / MIB),
        "descriptors": last.descriptors,
        "threads": last.threads,
        "judged": None if longest is None else _grown(longest),
        "resident_mib_by_second": [_series(life) for life in lives],
    }


def _series(life: Life) -> dict[int, float]:
    """About one sample in twenty seconds."""
    return {round(one.at - life.began): round(one.resident / MIB, 1) for one in life.samples[::10]}


def _grown(one: Growth) -> dict[str, Any]:
    return {
        "seconds": round(one.seconds),
        "resident_mib": [round(s.resident / MIB, 1) for s in (one.first, one.last)],
        "mib_a_minute": round(one.memory_slope / MIB, 2),
        "descriptors": [one.first.descriptors, one.last.descriptors],
        "threads": [one.first.threads, one.last.threads],
    }


def show(report: Report, console: Console) -> None:
    """Prints it."""
    transport = "mutual TLS" if report.tls else "plain text"
    console.print(
        f"\n[bold]Soak of {report.seconds:.0f} s, seed {report.seed}, {transport} between services"
    )
    table = _table("Requests", "count", "right", "wrong", "p50", "p99", "longest", "failed")
    for row in report.operations:
        table.add_row(
            row["operation"], *(str(row[name]) for name in ("count", "right", "wrong")),
            *(_seconds(row[name]) for name in ("p50_seconds", "p99_seconds", "longest_seconds")),
            _counts(row["failed"]),
        )  # fmt: skip
    console.print(table)
    table = _table("Faults", "times", "in flight", "met", "right", "wrong",
                   "recovery p50", "max", "failed")  # fmt: skip
    for row in report.faults:
        table.add_row(
            row["fault"],
            *(str(row[name]) for name in ("count", "in_flight", "met", "right", "wrong")),
            *(_seconds(row[name]) for name in ("recovery_p50_seconds", "recovery_max_seconds")),
            _counts(row["failed"]),
        )
    console.print(table)
    table = _table("Services", "lives", "RSS, PSS MiB", "files", "threads", "judged",
                   "least RSS MiB, by half", "MiB/min", "files", "threads")  # fmt: skip
    for row in report.services:
        now = f"{row['resident_mib']}, {row['proportional_mib']}"
        cells = [str(row["lives"]), now, str(row["descriptors"]), str(row["threads"])]
        if (grown := row["judged"]) is not None:
            cells += [f"{grown['seconds']} s", _span(grown["resident_mib"]),
                      f"{grown['mib_a_minute']:+.2f}", _span(grown["descriptors"]),
                      _span(grown["threads"])]  # fmt: skip
        table.add_row(row["service"], *cells)
    console.print(table)
    wrong = sum(row["wrong"] for row in report.operations)
    total = sum(row["count"] for row in report.operations)
    console.print(f"{total:,} requests, {wrong} wrong answers, {len(report.violations)} violations")
    for violation, count in Counter(report.violations).most_common(60):
        console.print(f"  [red]{count}×[/red] {violation}", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="left" if column == "failed" else "right")
    return table


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count}× {name}" for name, count in counts.items())


def _span(pair: Sequence[float]) -> str:
    return f"{pair[0]:g} → {pair[1]:g}"
