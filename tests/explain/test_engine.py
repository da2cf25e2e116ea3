"""Explanations over 1, 2 and 3 stages equal those of transformers' unsplit model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from miaotui.engine.scheduler import QueueFullError
from miaotui.explain.attention import AttentionRecord
from miaotui.explain.layers import gradient_layers
from miaotui.explain.runner import Activations, Attention, Explained, Explainer, Gradients
from miaotui.explain.stage import ExplainedWindow, ExplainStage, Target
from miaotui.models.compressed import Int8Linear
from miaotui.models.errors import BatchError, UnsupportedModelError
from miaotui.models.layers import LayerRange
from miaotui.models.stage import StageBatch, StageModel
from tests.checkpoints import FAMILIES, make_checkpoint, one_thread, random_sequences
from tests.explain import reference

SPLITS = {1: ("0-3",), 2: ("0-2", "2-3"), 3: ("0-1", "1-2", "2-3")}
TOKENS = 40
TARGET = Target(17, 19)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family to model directory, 3 layers each."""
    root = tmp_path_factory.mktemp("explained")
    return {family: make_checkpoint(root / family, family, seed=5) for family in FAMILIES}


class Pipeline:
    """Stages' explainers one behind the other, in this process; from `index` on."""

    def __init__(self, parts: list[Explainer], index: int = 0) -> None:
        self._own = parts[index]
        self._next = Pipeline(parts, index + 1) if index + 1 < len(parts) else None

    async def explain(
        self,
        window: ExplainedWindow,
        target: Target,
        *,
        max_points: int = 0,
        deadline: float | None = None,
    ) -> Explained:
        return await self._own.explain(
            window, target, self._next, max_points=max_points, deadline=deadline
        )

    async def differentiate(self, activations: Activations) -> Gradients:
        return await self._own.differentiate(activations, self._next)

    async def attend(self, activations: Activations) -> Attention:
        return await self._own.attend(activations, self._next)


@contextmanager
def explainer(
    directory: Path,
    split: tuple[str, ...],
    dtype: str = "float32",
    *,
    relative: float = 0.01,
    absolute: float = 0.02,
) -> Iterator[Pipeline]:
    """A pipeline of stages that explain."""
    parts = [
        Explainer(
            ExplainStage(
                StageModel.load(directory, LayerRange.parse(layers), dtype=dtype, device="cpu")
            ),
            index,
            at_once=2 if index else 1,
            relative=relative,
            absolute=absolute,
        )
        for index, layers in enumerate(split)
    ]
    try:
        yield Pipeline(parts)
    finally:
        for part in parts:
            part.close()


def window_of(family: str, directory: Path) -> ExplainedWindow:
    shape = StageModel.load(directory, LayerRange(0, 1), device="cpu").shape
    ids = random_sequences(shape, (TOKENS,), seed=3)[0]
    types = None
    if family in ("bert", "electra"):
        types = (torch.arange(TOKENS) >= 9).long()
    replaced = torch.ones(TOKENS, dtype=torch.bool)
    replaced[[0, 8, TOKENS - 1]] = False
    return ExplainedWindow(ids, types, replaced)


async def explained(directory: Path, split: tuple[str, ...], window: ExplainedWindow) -> Explained:
    with explainer(directory, split) as head:
        return await head.explain(window, TARGET)


@pytest.mark.parametrize("stages", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
async def test_split_equals_unsplit(checkpoints: dict[str, Path], family: str, stages: int) -> None:
    directory = checkpoints[family]
    window = window_of(family, directory)
    found = await explained(directory, SPLITS[stages], window)
    model = reference.load(directory)
    integral = found.integral
    wanted, logit, baseline = reference.attribution(
        model,
        window.input_ids,
        window.token_type_ids,
        window.replaced,
        (TARGET.first, TARGET.last),
        integral.points.tolist(),
        integral.weights.tolist(),
    )
    torch.testing.assert_close(found.attribution.float(), wanted, atol=1e-4, rtol=1e-4)
    assert integral.end == pytest.approx(logit, abs=1e-4)
    assert integral.start == pytest.approx(baseline, abs=1e-4)
    assert found.attention.logit == pytest.approx(logit, abs=1e-4)
    # Not vacuous: the words matter, and special tokens, which stay, are given nothing.
    assert wanted.abs().max() > 0.1
    assert found.attribution[~window.replaced].abs().max() == 0

    # Completeness.
    assert integral.within
    assert abs(integral.gap) <= max(0.05, 0.01 * abs(logit - baseline))
    assert float(found.attribution.sum()) - (logit - baseline) == pytest.approx(
        integral.gap, abs=1e-3
    )

    weights = reference.attention(model, window.input_ids, window.token_type_ids)
    rows = weights[:, :, [TARGET.first, TARGET.last]].mean(dim=2)
    torch.testing.assert_close(found.attention.rows, rows, atol=1e-5, rtol=0)
    rolled = reference.rollout(weights)[[TARGET.first, TARGET.last]].mean(dim=0)
    torch.testing.assert_close(found.attention.rollout, rolled, atol=1e-5, rtol=0)
    assert float(found.attention.rollout.sum()) == pytest.approx(1, abs=1e-5)

    assert [share.stage for share in found.shares] == list(range(stages))
    assert all(share.link_bytes > 0 for share in found.shares[:-1])
    assert found.shares[-1].link_bytes == 0


async def test_a_span_of_one_token(checkpoints: dict[str, Path]) -> None:
    window = window_of("bert", checkpoints["bert"])
    with explainer(checkpoints["bert"], SPLITS[2]) as head:
        found = await head.explain(window, Target(20, 20))
    weights = reference.attention(
        reference.load(checkpoints["bert"]), window.input_ids, window.token_type_ids
    )
    torch.testing.assert_close(found.attention.rows, weights[:, :, 20], atol=1e-5, rtol=0)


async def test_half_precision_stages_are_explained_in_float32(checkpoints: dict[str, Path]) -> None:
    window = window_of("bert", checkpoints["bert"])
    with explainer(checkpoints["bert"], SPLITS[2], "bfloat16") as head:
        found = await head.explain(window, TARGET)
    assert found.integral.within
    # The parameters are rounded, the arithmetic is not.
    exact = await explained(checkpoints["bert"], SPLITS[1], window)
    scale = float(exact.attribution.abs().max())
    assert float((found.attribution - exact.attribution).abs().max()) < 0.2 * scale


async def test_serving_goes_on_untouched(checkpoints: dict[str, Path]) -> None:
    """The same stage answers on another thread meanwhile, with the same bits as alone."""
    model = StageModel.load(checkpoints["electra"], device="cpu", dtype="float32")
    window = window_of("electra", checkpoints["electra"])
    batch = StageBatch([TOKENS], window.input_ids, window.token_type_ids)
    alone = model.run(batch)
    head = Explainer(ExplainStage(model), 0)
    task = asyncio.create_task(head.explain(window, TARGET, None))
    served = 0
    while not task.done():
        assert torch.equal(await asyncio.to_thread(model.run, batch), alone)
        served += 1
    await task
    head.close()
    assert served > 1
    assert not any(p.requires_grad for p in model.skeleton.root.parameters())


async def test_a_full_queue_refuses(checkpoints: dict[str, Path]) -> None:
    window = window_of("bert", checkpoints["bert"])
    with explainer(checkpoints["bert"], SPLITS[1]) as head:
        tasks = [asyncio.create_task(head.explain(window, TARGET)) for _ in range(7)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [result for result in results if isinstance(result, QueueFullError)]
    assert len(refused) == 2
    assert len([result for result in results if isinstance(result, Explained)]) == 5


async def test_little_time_gives_a_rougher_integral(checkpoints: dict[str, Path]) -> None:
    window = window_of("bert", checkpoints["bert"])
    with explainer(checkpoints["bert"], SPLITS[2], relative=0, absolute=1e-5) as head:
        rough = await head.explain(window, TARGET, deadline=time.monotonic() + 1e-3)
        fine = await head.explain(window, TARGET)
        bounded = await head.explain(window, TARGET, max_points=10)
    assert not rough.integral.within
    assert len(rough.integral.points) == len(bounded.integral.points) == 9
    assert len(fine.integral.points) > 9
    assert rough.integral.weights.sum() == pytest.approx(1)
    assert abs(rough.integral.gap) > abs(fine.integral.gap)
    wanted, _, _ = reference.attribution(
        *(reference.load(checkpoints["bert"]), window.input_ids, window.token_type_ids),
        *(window.replaced, (TARGET.first, TARGET.last)),
        *(fine.integral.points.tolist(), fine.integral.weights.tolist()),
    )
    torch.testing.assert_close(fine.attribution.float(), wanted, atol=1e-4, rtol=1e-4)


class _Broken:
    """A next stage that fails, at once or at the second pass."""

    def __init__(self, behind: Pipeline | None) -> None:
        self._behind = behind
        self._passes = 0

    async def differentiate(self, activations: Activations) -> Gradients:
        self._passes += 1
        if self._behind is None or self._passes > 1:
            raise ConnectionError("gone")
        return await self._behind.differentiate(activations)

    async def attend(self, activations: Activations) -> Attention:
        if self._behind is None:
            raise ConnectionError("gone")
        return await self._behind.attend(activations)


async def test_a_failing_stage_frees_its_place(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExplainStage, "pass_tokens", 2 * TOKENS)
    window = window_of("bert", checkpoints["bert"])
    first, last = (
        StageModel.load(checkpoints["bert"], LayerRange.parse(part), device="cpu")
        for part in SPLITS[2]
    )
    head = Explainer(ExplainStage(first), 0, waiting=0)
    behind = Explainer(ExplainStage(last), 1, at_once=2, waiting=0)
    for broken in (None, Pipeline([behind]), None, Pipeline([behind])):
        with pytest.raises(ConnectionError):
            await head.explain(window, TARGET, _Broken(broken))
    assert (await head.explain(window, TARGET, Pipeline([behind]))).integral.within
    head.close()
    behind.close()


async def test_copies_are_made_once_and_not_kept(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(layers: tuple[torch.nn.Module, ...], *names: Any) -> Any:
        made.append(len(layers))
        return gradient_layers(layers, *names)

    monkeypatch.setattr("miaotui.explain.stage.gradient_layers", counted)
    monkeypatch.setattr(ExplainStage, "pass_tokens", 2 * TOKENS)
    model = StageModel.load(checkpoints["bert"], device="cpu", dtype="bfloat16")
    stage = ExplainStage(model)
    head = Explainer(stage, 0)
    window = window_of("bert", checkpoints["bert"])
    first = await head.explain(window, TARGET, None)
    assert made == [3], "by the first of many passes"
    assert stage.holds_copies
    monkeypatch.setattr("miaotui.explain.runner.KEPT_SECONDS", 0.0)
    again = await head.explain(window, TARGET, None)
    assert made == [3]
    assert torch.equal(first.attribution, again.attribution)
    async with asyncio.timeout(60):
        while stage.holds_copies:
            await asyncio.sleep(0.01)
    head.close()


async def test_cancelling_frees_the_place(checkpoints: dict[str, Path]) -> None:
    window = window_of("bert", checkpoints["bert"])
    with explainer(checkpoints["bert"], SPLITS[3]) as head:
        for turns in range(1, 7):
            task = asyncio.create_task(head.explain(window, TARGET))
            # Turns of the loop, not time: a fast processor is done within 10 ms.
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (await head.explain(window, TARGET)).integral.within


async def test_what_does_not_fit_is_refused(checkpoints: dict[str, Path]) -> None:
    window = window_of("bert", checkpoints["bert"])
    with explainer(checkpoints["bert"], SPLITS[1]) as head:
        with pytest.raises(BatchError, match="span of tokens 5 to 4 of a window of 40"):
            await head.explain(window, Target(5, 4))
        with pytest.raises(BatchError, match="span of tokens 39 to 40"):
            await head.explain(window, Target(39, 40))
        long = ExplainedWindow(
            torch.zeros(513, dtype=torch.int64), None, torch.ones(513, dtype=torch.bool)
        )
        with pytest.raises(BatchError, match="513 tokens; this model takes 1 to 512"):
            await head.explain(long, TARGET)
        with pytest.raises(ValueError, match="max_points is 3"):
            await head.explain(window, TARGET, max_points=3)
        with pytest.raises(BatchError, match="stage 0, which takes windows"):
            await head.attend(Activations(torch.zeros(40, 32), 1, TARGET))
    model = StageModel.load(checkpoints["bert"], LayerRange(1, 3), device="cpu")
    explaining = Explainer(ExplainStage(model), 1)
    last = Pipeline([explaining])
    with pytest.raises(BatchError, match="do not divide into 3 points"):
        await last.differentiate(Activations(torch.zeros(40, 32), 3, TARGET))
    with pytest.raises(BatchError, match="hidden has shape"):
        await last.differentiate(Activations(torch.zeros(40, 31), 1, TARGET))
    explaining.close()


async def test_quantised_models_are_refused(checkpoints: dict[str, Path]) -> None:
    model = StageModel.load(checkpoints["bert"], device="cpu")
    layer = model.skeleton.layers[0].get_submodule("intermediate")
    layer.dense = Int8Linear(32, 128, bias=True, static=False)
    with pytest.raises(UnsupportedModelError, match="is quantised"):
        ExplainStage(model)


def test_layers_with_pruned_heads() -> None:
    record = AttentionRecord(1, 2)
    for heads in (4, 3):
        record(torch.randn(1, heads, 5, 8), torch.randn(1, heads, 5, 8), None)
    rows = record.rows(4)
    assert rows.shape == (2, 4, 5)
    torch.testing.assert_close(rows.sum(-1), torch.tensor([[1.0] * 4, [1.0, 1.0, 1.0, 0.0]]))
    assert float(record.roll(record.start(5)).sum()) == pytest.approx(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_cuda_equals_cpu(checkpoints: dict[str, Path], family: str, dtype: str) -> None:
    window = window_of(family, checkpoints[family])
    found = []
    for device in ("cpu", "cuda"):
        model = StageModel.load(checkpoints[family], device=device, dtype=dtype)
        head = Explainer(ExplainStage(model), 0)
        found.append(await head.explain(window, TARGET, None))
        head.close()
    cpu, cuda = found
    assert cuda.integral.within
    torch.testing.assert_close(cuda.attribution, cpu.attribution, atol=5e-3, rtol=1e-2)
    torch.testing.assert_close(cuda.attention.rollout, cpu.attention.rollout, atol=1e-3, rtol=0)
