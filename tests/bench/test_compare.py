"""The bench's own parts: arrivals at a rate, what an engine's answers are, and the report."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import threading
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from tests.bench import engines
from tests.bench.answering import Answerer
from tests.bench.arrivals import Arrivals
from tests.bench.questions import questions
from tests.bench.tables import (
    engine_cells,
    plot,
    print_cells,
    smaller,
    verdict,
    where,
    write_markdown,
)
from tests.bench.workload import Workload
from tests.checkpoints import make_checkpoint


@pytest.fixture
def url() -> Iterator[str]:
    """A server that refuses every third request."""
    loop, began, at = asyncio.new_event_loop(), threading.Event(), [0, 0]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r")[0])
                json.loads(await reader.readexactly(length))
                at[1] += 1
                status = b"503 Busy" if at[1] % 3 == 0 else b"200 OK"
                writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\n{}")
        except asyncio.IncompleteReadError:
            writer.close()

    async def start() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        at[0] = server.sockets[0].getsockname()[1]
        began.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=run)
    thread.start()
    assert began.wait(10)
    yield f"http://127.0.0.1:{at[0]}"

    def stop() -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.call_soon(loop.stop)

    loop.call_soon_threadsafe(stop)
    thread.join(10)
    loop.close()


def test_arrivals_come_at_their_rate_and_refusals_are_counted_apart(url: str) -> None:
    """A third of about 200 requests a second is refused; nothing is lost."""
    told = Arrivals(url).offer([{"question": "?"}], rate=200, seconds=1.0, path="/v1/qa")
    answered, refused = len(told["answered"]), len(told["refused"])
    assert told["failed"] == 0
    assert 90 < answered + refused < 240
    assert refused == pytest.approx((answered + refused) / 3, abs=1)
    assert told["answered_a_second"] > told["refused_a_second"] > 0


def test_a_flood_stops_at_a_refusal(url: str) -> None:
    """What is refused is no answer, and says so."""
    assert Arrivals(url).flood({}, count=2, at_once=1, path="/") > 0
    with pytest.raises(RuntimeError, match="503"):
        Arrivals(url).flood({}, count=3, at_once=1, path="/")


def test_an_engine_that_is_not_installed_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reason goes into the report."""
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "nncf" else name)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert engines.why_not("openvino") is None
    assert "nncf" in (engines.why_not("openvino-int8") or "")
    assert "g++" in (engines.why_not("transformers-compiled") or "")


def test_answers_of_batches_are_those_of_single_questions(tmp_path: Path) -> None:
    """Padding, sorting and windows change no answer: each is the best span computed alone."""
    make_checkpoint(tmp_path, "bert")
    bodies = [question.body for question in questions(5, seed=3, words=(5, 25))]
    answerer = Answerer("transformers", tmp_path, tmp_path)
    answerer.tune(bodies[:2], 2)
    assert answerer.answers(bodies, 2) == [_alone(tmp_path, body) for body in bodies]


def _alone(directory: Path, body: dict[str, str]) -> str:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForQuestionAnswering.from_pretrained(directory, dtype=torch.float32)
    encoded = tokenizer(
        body["question"], body["context"], return_tensors="pt", return_offsets_mapping=True
    )
    offsets = encoded.pop("offset_mapping")[0].tolist()
    with torch.inference_mode():
        output = model.eval()(**encoded)
    start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
    passage = [at for at, kind in enumerate(encoded.sequence_ids(0)) if kind == 1]
    spans = [(a, b) for a in passage for b in passage if a <= b < a + 30]
    first, last = max(spans, key=lambda span: start[span[0]] + end[span[1]])
    return body["context"][offsets[first][0] : offsets[last][1]]


def _row(name: str, kind: str, rate: float, f1: float, at_once: int = 32) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "at_once": at_once,
        "questions_a_second": rate,
        "p50": 10.0,
        "p99": None,
        "cores": 2.0,
        "memory": 900.0,
        "equal": 100.0,
        "f1": f1,
    }


ROWS = [
    _row("Miaotui float32", "miaotui", 40, 80.0),
    _row("Miaotui int8", "miaotui", 60, 79.6),
    _row("Miaotui int8-static", "miaotui", 90, 79.0),
    _row("transformers-int8 (all cores)", "bare", 48, 79.5, 0),
    _row("onnxruntime-int8 behind LitServe (2 workers)", "served", 50, 79.5),
]


def test_the_targets_are_judged_by_the_fastest_that_loses_half_a_point_at_most() -> None:
    """A faster one that loses more F1 does not count."""
    served, bare = verdict(ROWS)
    assert served.startswith("Miaotui int8 at 32")
    assert "1.20 times the best served peer" in served
    assert "missed" in served
    assert "1.25 times the best bare peer" in bare
    assert "reached" in bare


def test_a_checkpoint_of_other_weights_is_not_compared_with_peers() -> None:
    pruned = _row("Miaotui pruned", "miaotui", 200, 80.0)
    assert verdict([pruned, *ROWS]) == verdict(ROWS)
    parameters = {"Miaotui bfloat16": 48, "Miaotui int8-static": 24, "Miaotui pruned": 12}
    assert smaller([pruned, *ROWS], parameters)[0].startswith("Miaotui pruned holds 0.25")


def test_the_standard_error_of_a_difference_in_f1() -> None:
    truths: list[tuple[str, ...]] = [("b c",), ("d",), ("e",), ("f",)]
    work = Workload([{}] * 4, truths)
    exact, half, wrong = ["b c", "d", "e", "f"], ["b", "d", "e", "f"], ["b", "d", "e", "x"]
    assert work.f1(exact) == 100
    assert work.f1_error(exact, exact) == 0
    # F1 of "b" for "b c" is 2/3: differences of -1/3, 0, 0, 0, and of -1/3, 0, 0, -1.
    assert work.f1_error(half, exact) == pytest.approx(100 / 3 / 4)
    assert work.f1_error(wrong, exact) == pytest.approx(100 * math.sqrt(2 / 9) / 2)
    assert Workload([{}], []).f1_error(["b"], ["b"]) is None


def test_the_smaller_model_is_the_fastest_that_loses_one_point_at_most() -> None:
    parameters = {"Miaotui bfloat16": 48, "Miaotui int8": 25, "Miaotui int8-static": 24}
    (line,) = smaller(ROWS, parameters)
    assert line.startswith("Miaotui int8-static holds 0.50 of bfloat16's bytes")
    assert "2.25 times as fast as Miaotui float32" in line
    assert "for 1.0 F1" in line
    worse = [row if row["name"] != "Miaotui int8-static" else {**row, "f1": 78.9} for row in ROWS]
    assert smaller(worse, parameters)[0].startswith("Miaotui int8 holds 0.52")
    assert smaller(ROWS[3:], parameters) == []


def test_the_report_says_where_the_time_goes() -> None:
    assert where(ROWS) == []
    rows = [{**ROWS[0], "parts": {"gateway": 2.04, "shard-0": 30.0}}, *ROWS[1:]]
    assert where(rows) == [
        "CPU ms a question, Miaotui float32, 32 at once: gateway 2.0, shard-0 30.0"
    ]


def test_reports_are_whole_at_eighty_columns(tmp_path: Path) -> None:
    """No figure and no name is cut off, on the terminal and in Markdown."""
    output = StringIO()
    print_cells(engine_cells(ROWS), Console(file=output, width=80))
    report = {
        "model": "qa",
        "machine": "this",
        "parts": {"engines": {"title": "Engines", "rows": ROWS, "skipped": [("x", "not there")]}},
    }
    write_markdown(report, tmp_path / "bench.md")
    written = (tmp_path / "bench.md").read_text()
    for row in ROWS:
        assert row["name"] in output.getvalue()
        assert row["name"] in written
    assert "left out: x: not there" in written


def test_the_plot_needs_f1(tmp_path: Path) -> None:
    """Drawn where answers are known."""
    assert plot(ROWS, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count("Miaotui") >= 1
    assert not plot([{**row, "f1": None} for row in ROWS], tmp_path / "none.svg")
