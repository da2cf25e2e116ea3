"""Models made to read question and passage apart."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from miaotui.compression import CompressionError, compress_model
from miaotui.compression.questions import labelled_batches, read_examples, stage_batch
from miaotui.compression.recover import recover
from miaotui.compression.workspace import Workspace
from miaotui.models.checkpoint import read_config
from miaotui.models.decomposed import KEY
from miaotui.models.stage import StageModel
from miaotui.text.tokenizer import load_tokenizer
from tests.checkpoints import make_checkpoint
from tests.processes import Cluster, free_port

PASSAGE = "The Eiffel Tower stands in Paris. Gustave Eiffel's company built it in 1887."
QUESTIONS = ("Where does it stand?", "Who built it?", "When was it built?", "What stands there?")


@pytest.mark.parametrize(
    "method", ["decompose=2", "decompose=1,int8", "prune-neurons=0.3,decompose=2"]
)
def test_the_checkpoint_computes_what_the_workspace_does(
    model: Path, questions: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "made"
    compress_model(model, out, method=method, calibrate=[questions])
    config = read_config(out)
    assert config[KEY] == (1 if "=1" in method else 2)
    assert config["miaotui_compression"]["steps"] == method.split(",")
    examples = read_examples([questions], load_tokenizer(model), limit=7)
    batch = stage_batch([window for example in examples for window in example.windows])
    made = StageModel.load(out, device="cpu", dtype="float32").run(batch)
    if "int8" in method:  # whose codes cannot be opened again
        workspace = Workspace.open(model)
        workspace.decompose(1)
    else:
        workspace = Workspace.open(out)
    with torch.no_grad():
        logits = workspace.logits(batch)
    whole = StageModel.load(model, device="cpu", dtype="float32").run(batch)
    error = (made - logits).square().mean().sqrt() / logits.square().mean().sqrt()
    assert error < (0.08 if "int8" in method else 1e-5)
    assert (made - whole).abs().max() > 0.5


def test_recovery_brings_it_nearer_to_what_it_was(model: Path, questions: Path) -> None:
    examples = read_examples([questions], load_tokenizer(model), limit=7)
    batches = list(labelled_batches(examples, tokens=128))
    teacher, student = Workspace.open(model), Workspace.open(model)
    student.decompose(2)

    def distance() -> float:
        with torch.no_grad():
            pairs = [(student.logits(b.batch), teacher.logits(b.batch)) for b in batches]
        return float(torch.cat([(a - b).square() for a, b in pairs]).mean())

    before = distance()
    # What is trained are the spans' probabilities, which logits follow only roughly.
    losses = recover(student, teacher, batches, 60, learning_rate=2e-4, exactly=True)
    assert losses[-1] < losses[0] * 0.6
    assert distance() < before


def test_what_cannot_be_done_is_refused(model: Path, questions: Path, tmp_path: Path) -> None:
    for method, complaint in (
        ("decompose=3", "of 3 layers 1 to 2"),
        ("decompose=0.5", "whole number of layers"),
        ("decompose=1,decompose=2", "twice"),
        ("int8,decompose=1", "put the quantisation last"),
    ):
        with pytest.raises(CompressionError, match=complaint):
            compress_model(model, tmp_path / "made", method=method)
    compress_model(model, tmp_path / "once", method="decompose=1")
    with pytest.raises(CompressionError, match="apart already"):
        compress_model(tmp_path / "once", tmp_path / "made", method="decompose=1")
    roberta = make_checkpoint(tmp_path / "roberta", "roberta", layers=3)
    with pytest.raises(CompressionError, match="token types"):
        compress_model(roberta, tmp_path / "made", method="decompose=1")


def test_a_layer_taken_out_of_those_is_counted_out(model: Path) -> None:
    workspace = Workspace.open(model)
    workspace.decompose(2)
    workspace.drop_layer(2)
    assert workspace.decomposed == 2
    workspace.drop_layer(0)
    assert workspace.decomposed == 1


async def test_answers_are_the_same_whether_or_not_the_passage_was_there(
    model: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    compress_model(model, made, method="decompose=1")

    async def ask(url: str, questions: tuple[str, ...]) -> list[Any]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            answers = []
            for question in questions:
                body = {"question": question, "context": PASSAGE, "top_k": 3}
                response = await client.post("/v1/qa", json=body)
                assert response.status_code == 200, response.text
                answers.append(response.json())
            return answers

    port = free_port()
    kept = {"MIAOTUI_SHARD_METRICS_PORT": str(port)}
    without = {"MIAOTUI_SHARD_PASSAGE_CACHE_BYTES": "0"}
    async with Cluster(made, stages=1, shard_env=kept) as one:
        found = await ask(one.url, QUESTIONS)
        lookups = await asyncio.to_thread(_lookups, port)
    async with Cluster(made, stages=2, shard_env=without) as two:
        expected = await ask(two.url, QUESTIONS)
    assert lookups == {"miss": 1, "hit": len(QUESTIONS) - 1}
    for mine, theirs in zip(found, expected, strict=True):
        assert [a["text"] for a in mine["answers"]] == [a["text"] for a in theirs["answers"]]
        for a, b in zip(mine["answers"], theirs["answers"], strict=True):
            assert a["score"] == pytest.approx(b["score"], abs=1e-4)


def _lookups(port: int) -> dict[str, int]:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
    return {
        sample.labels["miaotui_cache_result"]: int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "miaotui_stage_passages_total"
    }
