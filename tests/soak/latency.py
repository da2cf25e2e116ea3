"""Two stages, a tokenizer and a gateway on hosts of their own: right answers, the latency that
the links predict, and what somebody on the wire can read.

A question crosses a link six times: gateway → tokenizer → gateway → stage 0 → stage 1 →
stage 0 → gateway. So it should take a time of its own, whatever the links are like, and six
times the delay.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.namespaces import Hosts
from tests.soak.cases import QuestionCase, make_cases, make_models
from tests.soak.client import Client
from tests.soak.deployment import Deployment, Models, host_names
from tests.soak.judge import OK

DELAYS = (0.0, 0.005, 0.02, 0.05)
CROSSINGS = 6
_LINKS = (("gateway", "tokenizer"), ("gateway", "qa-0"), ("qa-0", "qa-1"))
# Longer ones fill more than one of HTTP/2's windows, which is another matter.
_LONGEST_PASSAGE = 300
_TIMEOUT = 30.0
# Of the predicted time: one crossing fewer or more would show at the longer delays.
_TOLERANCE = 0.12
_NOISE_MILLISECONDS = 10.0


@dataclass(frozen=True)
class Latency:
    """Milliseconds at one delay, which is in seconds; `measured` of the quickest quarter."""

    tls: bool
    delay: float
    predicted: float
    measured: float
    median: float
    questions: int
    wrong: int

    @property
    def off(self) -> float:
        """By how much it took longer than predicted, as a share."""
        return self.measured / self.predicted - 1


@dataclass(frozen=True)
class Capture:
    """What a capture of all links holds."""

    tls: bool
    bytes: int
    texts: int
    readable: int
    method: bool
    """Whether the name of the method called stands in it."""


@dataclass(frozen=True)
class LinkReport:
    """Both."""

    latencies: Sequence[Latency]
    captures: Sequence[Capture]

    @property
    def violations(self) -> list[str]:
        """What is not as it must be."""
        found = []
        for one in self.latencies:
            name = f"{'TLS' if one.tls else 'plain'}, {one.delay * 1e3:g} ms"
            if one.wrong:
                found.append(f"{name}: {one.wrong} answers are not those of one process")
            allowed = max(_NOISE_MILLISECONDS, _TOLERANCE * one.predicted)
            if one.delay and abs(one.measured - one.predicted) > allowed:
                found.append(f"{name}: {one.measured:.1f} ms for {one.predicted:.1f} predicted")
        for seen in self.captures:
            if seen.tls and (seen.readable or seen.method):
                found.append(f"over TLS, {seen.readable} texts can be read on the wire")
            if not seen.tls and not (seen.readable == seen.texts and seen.method):
                found.append("the capture does not even hold what is sent in plain text")
        return found

    def json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "violations": self.violations}


async def measure_links(
    directory: Path, say: Callable[[str], None], *, tiny: bool, count: int = 20
) -> LinkReport:
    """Measures with `count` questions a delay, in plain text and over TLS."""
    # Services inherit it: what they wait for should be the links, not other work.
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    models = make_models(directory, tiny=tiny)
    models = Models(models.qa)
    cases = await asyncio.to_thread(make_cases, models, count=5 * count, seed=5)
    short = [one for one in cases.questions if len(one.asked.context) <= _LONGEST_PASSAGE][:count]
    assert len(short) == count, "too few short passages"
    latencies: list[Latency] = []
    captures: list[Capture] = []
    for tls in (False, True):
        say(f"starting two stages, {'with mutual TLS' if tls else 'in plain text'}")
        with Hosts(len(host_names(models, 1))) as hosts:
            place = directory / ("tls" if tls else "plain")
            async with Deployment(hosts, models, place, tls=tls) as deployment:
                client = Client(deployment)
                try:
                    captures.append(await _capture(hosts, client, short, place, tls))
                    latencies += await _latencies(deployment, client, short, tls)
                finally:
                    await client.close()
    return LinkReport(latencies, captures)


async def _latencies(
    deployment: Deployment, client: Client, cases: Sequence[QuestionCase], tls: bool
) -> list[Latency]:
    taken: dict[float, list[float]] = {delay: [] for delay in DELAYS}
    wrong = dict.fromkeys(DELAYS, 0)
    for case in cases:
        # In turns: whatever else the machine does then, it does it to all alike.
        for delay in DELAYS:
            for ends in _LINKS:
                deployment.link(ends).delay(delay)
            await asyncio.sleep(0.02)
            outcome = await client.question(case, _TIMEOUT, cached=False)
            taken[delay].append(1e3 * outcome.seconds)
            wrong[delay] += outcome.status != OK
    # What it takes apart from the links, which is the same at every delay.
    local = statistics.median(_quick(taken[delay]) - CROSSINGS * delay * 1e3 for delay in DELAYS)
    return [
        Latency(
            tls, delay, local + CROSSINGS * delay * 1e3, _quick(taken[delay]),
            statistics.median(taken[delay]), len(cases), wrong[delay],
        )
        for delay in DELAYS
    ]  # fmt: skip


def _quick(milliseconds: Sequence[float]) -> float:
    """The median of the quickest quarter: other work on the machine only ever adds time."""
    return statistics.median(sorted(milliseconds)[: max(1, len(milliseconds) // 4)])


async def _capture(
    hosts: Hosts, client: Client, cases: Sequence[QuestionCase], directory: Path, tls: bool
) -> Capture:
    file = directory / "wire.pcap"
    hosts.capture(file)
    for case in cases:
        await client.question(case, _TIMEOUT, cached=False)
    hosts.capture(None)
    await asyncio.sleep(0.2)
    seen = await asyncio.to_thread(file.read_bytes)
    texts = [text for case in cases for text in (case.asked.question, case.asked.context)]
    readable = sum(text.encode() in seen for text in texts)
    method = b"miaotui.v1.TokenizerService" in seen
    return Capture(tls, len(seen), len(texts), readable, method)


def show_links(report: LinkReport, console: Console) -> None:
    """Prints it."""
    table = Table(
        title="Two stages, a tokenizer and a gateway on four hosts", title_justify="left",
        title_style="bold", box=None, pad_edge=False,
    )  # fmt: skip
    for column in (
        "",
        "delay a link",
        "predicted",
        "measured",
        "off",
        "median",
        "questions",
        "wrong",
    ):
        table.add_column(column, justify="right" if column else "left")
    for one in report.latencies:
        table.add_row(
            "mutual TLS" if one.tls else "plain text",
            f"{one.delay * 1e3:g} ms",
            f"{one.predicted:.1f} ms",
            f"{one.measured:.1f} ms",
            f"{one.off:+.1%}",
            f"{one.median:.1f} ms",
            str(one.questions),
            str(one.wrong),
        )
    console.print(table)
    for seen in report.captures:
        name = "mutual TLS" if seen.tls else "plain text"
        console.print(
            f"capture, {name}: {seen.bytes:,} bytes of all links hold {seen.readable} of "
            f"{seen.texts} questions and passages, "
            f"and the method's name {'too' if seen.method else 'neither'}"
        )
    for violation in report.violations:
        console.print(f"  [red]violated[/red] {violation}", highlight=False)
