"""An explanation's way through the stages: activations down, gradients and attention back up."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from miaotui.engine.scheduler import QueueFullError
from miaotui.engine.worker import stay_on_one_thread
from miaotui.explain.quadrature import DEFAULT_MAX_POINTS, Integral, PathIntegral
from miaotui.explain.stage import (
    ExplainedWindow,
    ExplainStage,
    ForwardPass,
    Target,
    split_points,
)

T = TypeVar("T")

# Passes that are on their way at once: one computes at a stage while another does at the next.
PASSES_UNDER_WAY = 2
# Of Linux's -20 to 19: a thread at 15 gets about a thirtieth of a core that another wants.
_NICENESS = 15
# What a stage makes for an explanation is kept for so many seconds after a pass: passes of the same
# explanation come one after another, and what comes of it may take as much memory as the weights.
KEPT_SECONDS = 2.0
# A round of refinement begins where it may take so many times as long as the longest before it.
_SPARE = 2.0


@dataclass(frozen=True, slots=True)
class Share:
    """What a stage did: seconds of computing, tokens of all passes, bytes to and from the next."""

    stage: int
    first_layer: int
    end_layer: int
    seconds: float
    tokens: int
    link_bytes: int


@dataclass(frozen=True, slots=True)
class Activations:
    """A window at several points, one after another: float32 [points * tokens, hidden_size]."""

    hidden: torch.Tensor
    points: int
    target: Target


@dataclass(frozen=True, slots=True)
class Gradients:
    """Of the points' logits (float64 [points]) with respect to activations, of their shape."""

    hidden: torch.Tensor
    logits: torch.Tensor
    shares: list[Share]


@dataclass(frozen=True, slots=True)
class Attention:
    """Of the layers from a stage on.

    `rows`: float32 [layers, heads, tokens], from the target's tokens; `rollout`: float32
    [tokens]; `logit`: the target's.
    """

    rows: torch.Tensor
    rollout: torch.Tensor
    logit: float
    shares: list[Share]


@dataclass(frozen=True, slots=True)
class Explained:
    """Why a window's span has its logit: `attribution` float64 [tokens] sums up to `integral`."""

    attribution: torch.Tensor
    attention: Attention
    integral: Integral
    shares: list[Share]


class Downstream(Protocol):
    """The next stage."""

    async def differentiate(self, activations: Activations) -> Gradients:
        """Run them on to the logits, and return the gradients."""

    async def attend(self, activations: Activations) -> Attention:
        """Run one point on, and return the attention of the layers there and after."""


class Explainer:
    """Explains, at one stage, on a thread of its own and of low priority.

    One core is all that it takes, and only while nothing else wants that one: a second team of
    OpenMP threads in the process would slow the serving one down (`engine.threads`).
    """

    def __init__(
        self,
        stage: ExplainStage,
        index: int,
        *,
        at_once: int = 1,
        waiting: int = 4,
        relative: float = 0.01,
        absolute: float = 0.02,
    ) -> None:
        """`index`: the stage's.

        `relative` and `absolute`: how far the attributions' sum may be off, as `PathIntegral`
        takes them.

        `at_once` explanations (at stage 0; passes elsewhere) are worked on, and `waiting` more
        may wait; then `QueueFullError` is raised.
        """
        self.stage = stage
        self._index = index
        self._tolerance = (relative, absolute)
        self._room = asyncio.Semaphore(at_once)
        self._most = at_once + waiting
        self._inside = 0
        self._thread = ThreadPoolExecutor(1, "explain", initializer=_be_modest)
        self._release: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Lets the thread end once it has done what it is at."""
        self._keep()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def explain(
        self,
        window: ExplainedWindow,
        target: Target,
        downstream: Downstream | None,
        *,
        max_points: int = 0,
        deadline: float | None = None,
    ) -> Explained:
        """Stage 0: explains a span of a window; `max_points` 0: the default.

        `downstream` is the next stage, None where there is only one; its errors pass. The
        integral is refined only while there is time for it until `deadline`, on
        `time.monotonic()`.

        Raises:
            QueueFullError: enough explanations wait already.
            BatchError: the window or span does not fit the model.
            ValueError: `max_points` is too small.
        """
        relative, absolute = self._tolerance
        integral = PathIntegral(
            relative=relative, absolute=absolute, max_points=max_points or DEFAULT_MAX_POINTS
        )
        async with self._admitted():
            attention = await self._attend(window, len(window), target, downstream)
            baseline, difference = await self._compute(lambda: self.stage.words(window))
            shares = list(attention.shares)
            passes = asyncio.Semaphore(PASSES_UNDER_WAY)

            async def pass_(points: list[float]) -> tuple[Gradients, torch.Tensor]:
                async with passes:
                    return await self._path(
                        window, baseline, difference, points, target, downstream
                    )

            longest = 0.0
            while wanted := integral.wanted():
                began = time.monotonic()
                if longest and deadline is not None and began + _SPARE * longest > deadline:
                    break
                chunks = split_points(wanted, len(window), self.stage.pass_tokens)
                done = await _all([pass_(chunk) for chunk in chunks])
                logits = torch.cat([gradients.logits for gradients, _ in done])
                slopes = torch.cat([slope for _, slope in done])
                integral.add(wanted, logits.tolist(), slopes.double().numpy())
                for gradients, _ in done:
                    shares = _added(shares, gradients.shares)
                longest = max(longest, time.monotonic() - began)
            result = integral.result()
        return Explained(torch.from_numpy(np.array(result.total)), attention, result, shares)

    async def differentiate(
        self, activations: Activations, downstream: Downstream | None
    ) -> Gradients:
        """Other stages: runs activations on, and returns their gradients.

        `downstream` is the next stage, None at the last; its errors pass.

        Raises:
            QueueFullError: enough passes wait already.
            BatchError: they do not fit this stage.
        """
        async with self._admitted():
            return await self._differentiate(
                lambda: self.stage.resume(
                    activations.hidden, activations.points, activations.target
                ),
                activations.target,
                downstream,
            )

    async def attend(self, activations: Activations, downstream: Downstream | None) -> Attention:
        """Other stages: the attention from here on. Raises as `differentiate`."""
        async with self._admitted():
            hidden = activations.hidden
            return await self._attend(hidden, len(hidden), activations.target, downstream)

    async def _path(
        self,
        window: ExplainedWindow,
        baseline: torch.Tensor,
        difference: torch.Tensor,
        points: list[float],
        target: Target,
        downstream: Downstream | None,
    ) -> tuple[Gradients, torch.Tensor]:
        """The gradients at some points, and by token the slope along the path, [points, tokens]."""

        def start() -> ForwardPass:
            steps = torch.tensor(points, dtype=torch.float32, device=difference.device)
            return self.stage.start(window, baseline, steps[:, None, None] * difference, target)

        gradients = await self._differentiate(start, target, downstream)
        return gradients, (gradients.hidden * difference.cpu()).sum(-1)

    async def _differentiate(
        self,
        forward: Callable[[], ForwardPass],
        target: Target,
        downstream: Downstream | None,
    ) -> Gradients:
        began = time.monotonic()
        run = await self._compute(forward)
        seconds = time.monotonic() - began
        sent = 0
        gradient, logits, shares = None, run.logits, []
        if run.output is not None:
            assert downstream is not None, "only the last stage has logits"
            reply = await downstream.differentiate(Activations(run.output, run.points, target))
            gradient, logits, shares = reply.hidden, reply.logits, reply.shares
            sent = run.output.nbytes + gradient.nbytes
        began = time.monotonic()
        found = await self._compute(lambda: run.backward(gradient))
        seconds += time.monotonic() - began
        assert logits is not None, "the last stage has them"
        return Gradients(found, logits, [self._share(seconds, run.tokens, sent), *shares])

    async def _attend(
        self,
        inputs: ExplainedWindow | torch.Tensor,
        tokens: int,
        target: Target,
        downstream: Downstream | None,
    ) -> Attention:
        began = time.monotonic()
        hidden, record, logit = await self._compute(lambda: self.stage.attend(inputs, target))
        seconds = time.monotonic() - began
        heads = self.stage.shape.heads
        if logit is not None:
            row = record.start(tokens)
            own = self._share(seconds, tokens, 0)
            return Attention(record.rows(heads), record.roll(row), logit, [own])
        assert downstream is not None, "only the last stage has logits"
        reply = await downstream.attend(Activations(hidden, 1, target))
        rows = record.rows(heads)
        sent = hidden.nbytes + reply.rollout.nbytes + reply.rows.nbytes
        return Attention(
            torch.cat([rows, reply.rows]),
            record.roll(reply.rollout),
            reply.logit,
            [self._share(seconds, tokens, sent), *reply.shares],
        )

    def _share(self, seconds: float, tokens: int, link_bytes: int) -> Share:
        info = self.stage.info
        return Share(self._index, info.first_layer, info.end_layer, seconds, tokens, link_bytes)

    async def _compute(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        if self._inside >= self._most:
            raise QueueFullError(
                f"{self._most} explanations are under way or wait; try again later"
            )
        self._inside += 1
        self._keep()
        try:
            async with self._room:
                yield
        finally:
            self._inside -= 1
            if not self._inside:
                loop = asyncio.get_running_loop()
                self._release = loop.call_later(KEPT_SECONDS, self._let_go)

    def _let_go(self) -> None:
        # On the thread, so after what may still be computed for a call that was given up.
        with suppress(RuntimeError):  # closed in the meantime
            self._thread.submit(self.stage.release)

    def _keep(self) -> None:
        if self._release is not None:
            self._release.cancel()
            self._release = None


def _be_modest() -> None:
    """Makes the calling thread give way to all others; Linux has niceness by thread."""
    stay_on_one_thread()
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Awaits all; where one fails, the others are cancelled first."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _added(before: list[Share], more: list[Share]) -> list[Share]:
    return [
        replace(
            one,
            seconds=one.seconds + other.seconds,
            tokens=one.tokens + other.tokens,
            link_bytes=one.link_bytes + other.link_bytes,
        )
        for one, other in zip(before, more, strict=True)
    ]
