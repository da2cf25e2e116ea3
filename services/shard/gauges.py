"""What a stage holds at this moment, for dashboards and for scaling on the queue's depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from miaotui.engine.decode.pool import GenerationPool
from miaotui.models.decomposed import PassageCache
from miaotui.v1 import shard_pb2 as pb
from services.shard.stage import Stage


def observe(stage: Stage, passages: PassageCache | None = None, *, shared: bool = False) -> None:
    """Registers the stage's gauges; they are read whenever metrics are collected.

    `passages`: what it keeps, where its model reads passages apart; `shared`: in Redis, too.
    """
    labels = {"miaotui.stage": stage.info.index}
    if passages is not None:
        _observe_passages(passages, labels, shared=shared)

    def gauge(name: str, unit: str, description: str, read: Callable[[], int]) -> None:
        def callback(_: CallbackOptions) -> Iterable[Observation]:
            yield Observation(read(), labels)

        metrics.get_meter("miaotui.shard").create_observable_gauge(
            name, callbacks=[callback], unit=unit, description=description
        )

    gauge(
        "miaotui.stage.queued",
        "{sequence}",
        "Sequences that wait for their computation",
        lambda: stage.queued,
    )
    if (head := stage.head) is not None:
        gauge(
            "miaotui.stage.running",
            "{sequence}",
            "Sequences in the pipeline: computed, or on their way between stages",
            lambda: head.running_sequences,
        )
    if isinstance(head, GenerationPool):
        pool = head

        gauge(
            "miaotui.kv.blocks",
            "{block}",
            "Blocks of the KV cache of the stage that has fewest, of all lanes",
            lambda: pool.blocks,
        )
        gauge(
            "miaotui.kv.blocks.used",
            "{block}",
            "KV blocks that texts hold",
            lambda: pool.used,
        )
        gauge(
            "miaotui.kv.blocks.cached",
            "{block}",
            "KV blocks that nobody holds, kept for prompts that begin alike",
            lambda: pool.cached,
        )
        gauge(
            "miaotui.kv.preemptions",
            "{text}",
            "Texts that gave up their KV blocks to others and were computed again, since start",
            lambda: pool.preemptions,
        )
    gauge(
        "miaotui.stage.serving",
        "1",
        "1 where the stage serves; 0 where it waits for a neighbour, fits none, or drains",
        lambda: int(stage.status()[0] == pb.STAGE_STATUS_SERVING),
    )


def _observe_passages(passages: PassageCache, labels: dict[str, int], *, shared: bool) -> None:
    meter = metrics.get_meter("miaotui.shard")

    def lookups(_: CallbackOptions) -> Iterable[Observation]:
        yield Observation(passages.hits, {**labels, "miaotui.cache.result": "hit"})
        if shared:
            yield Observation(passages.shared, {**labels, "miaotui.cache.result": "redis"})
        yield Observation(passages.misses, {**labels, "miaotui.cache.result": "miss"})

    meter.create_observable_counter(
        "miaotui.stage.passages",
        callbacks=[lookups],
        unit="{passage}",
        description="Passages that the first layers' results were there of (hit: in memory, redis: "
        "in Redis), and were not",
    )
    meter.create_observable_gauge(
        "miaotui.stage.passages.bytes",
        callbacks=[lambda _: [Observation(passages.held_bytes, labels)]],
        unit="By",
        description="Results of the first layers that are kept of passages",
    )
