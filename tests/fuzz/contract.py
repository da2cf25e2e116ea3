"""Cases that Schemathesis makes of the OpenAPI document, and its checks of what comes of them.

`tests/fuzz/http.py` asks whether anything falls over; this whether the document tells the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, events, from_schema
from schemathesis.engine.recorder import ScenarioRecorder

from tests.fuzz.cases import HANG_SECONDS, LATE, Tally

NAME = "Schemathesis"
# In the order in which it runs them. The first two need no chance and are the same each time.
PHASES = ("examples", "coverage", "fuzzing", "stateful")
# docs/fuzzing.md says why these, and why not the others.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
    "allow_header_conformance",
    "use_after_free",
    "ensure_resource_availability",
)

_WRITING = ("POST /v1/chat/completions", "POST /v1/completions")


def check(
    url: str,
    seed: int,
    examples: int,
    phases: Sequence[str] = PHASES,
    only: str = "",
    description: Path | None = None,
) -> dict[str, Tally]:
    """Runs to the end, on the thread that calls; what came, by "Schemathesis, POST /v1/qa".

    `examples`: cases of each operation, where they are drawn; `only`: one operation, such as
    "POST /v1/qa"; `description`: a file, where it is not the gateway's own.
    """
    config = SchemathesisConfig.from_dict(_config(url, seed, examples, phases))
    whole = (
        schemathesis.openapi.from_url(f"{url}/openapi.json", config=config)
        if description is None
        else schemathesis.openapi.from_path(description, config=config)
    )
    schema = whole.include(name=only) if only else whole
    tallies: dict[str, Tally] = {}
    for event in from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            _count(event, tallies)
        elif isinstance(event, events.NonFatalError):
            tally = tallies.setdefault(f"{NAME}, {event.label}", Tally())
            tally.findings.append((0, f"cannot be tested: {event.info.message}"))
        elif isinstance(event, events.FatalError):
            raise event.exception
    return tallies


def _config(url: str, seed: int, examples: int, phases: Sequence[str]) -> dict[str, Any]:
    checks: dict[str, Any] = {name: {"enabled": True} for name in CHECKS}
    # A deadline that ran out is the answer that was promised.
    checks["not_a_server_error"]["expected-statuses"] = ["2xx", "3xx", "4xx", "504"]
    return {
        "seed": seed,
        "base-url": url,
        "workers": 1,
        "continue-on-failure": True,
        "request-timeout": HANG_SECONDS,
        "checks": {"enabled": False, **checks},
        "phases": {name: {"enabled": name in phases} for name in PHASES},
        # The borders of these fields are 762 requests; the right ones have texts written.
        "operations": [
            {"include-name": name, "phases": {"coverage": {"enabled": False}}} for name in _WRITING
        ],
        "generation": {"max-examples": examples, "no-shrink": True, "database": "none"},
    }


def _count(event: events.ScenarioFinished, tallies: dict[str, Tally]) -> None:
    recorder = event.recorder
    for identifier, node in recorder.cases.items():
        tally = tallies.setdefault(f"{NAME}, {node.value.operation.label}", Tally())
        tally.seconds += event.elapsed_time / len(recorder.cases)
        response = recorder.interactions[identifier].response
        late = response is not None and LATE.encode() in (response.content or b"")
        wrong = [] if late else _wrong(recorder, identifier)
        outcome = "no response" if response is None else str(response.status_code)
        if wrong:
            tally.findings.append((tally.outcomes.total(), "; ".join(wrong)))
            outcome = "FOUND"
        tally.outcomes[outcome] += 1


def _wrong(recorder: ScenarioRecorder, identifier: str) -> list[str]:
    found = []
    for check in recorder.checks.get(identifier, ()):
        if check.status is Status.FAILURE and check.failure_info is not None:
            failure = check.failure_info.failure
            sent = check.failure_info.code_sample
            found.append(f"{check.name}: {failure.title}: {failure.message[:400]} ({sent[:600]})")
    return found
