"""How an answer and its explanation came about, hop by hop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from gateway.explanation import Step
from gateway.pipeline import Clock, Looked
from gateway.schema import CacheStatus, Hop
from miaotui.v1 import explain_pb2 as pb

_DID = {
    "cache": "looked for the answer under the question, the passage and the options",
    "wait": "waited for an equal question that was being answered",
    "tokenizer": "cleaned and tokenised question and passage, and cut the passage into windows",
    "queue": "waited for the stages",
    "links": "carried activations from stage to stage and logits back",
    "read": "found the best spans in the logits of all windows",
    "retrieval": "searched the collection for passages that fit the question",
    "total": "answered",
}


def answer_path(cache: CacheStatus, timings: Sequence[Hop]) -> list[Step]:
    """What was done to answer; `timings` are the answer's."""
    steps = []
    for hop in timings:
        did = _DID.get(hop.hop, "")
        if hop.hop.startswith("stage "):
            did = "computed its layers for all windows"
        known: Literal["hit", "miss"] | None = None
        if hop.hop == "cache" and cache is not CacheStatus.BYPASS:
            known = "hit" if cache in (CacheStatus.HIT, CacheStatus.SHARED) else "miss"
        steps.append(Step(hop.hop, did, hop.milliseconds, known, None))
    return steps


def explain_path(
    looked: Looked,
    window: int,
    window_logits: Sequence[float],
    explained: pb.ExplainResponse,
    clock: Clock,
) -> list[Step]:
    """What was done to explain, after the answer was there.

    `window`: the answer's; `window_logits`: of each window's best span.
    """
    milliseconds = {name: seconds * 1000 for name, seconds in clock.hops.items()}
    windows = looked.windows.windows
    sizes = [len(window.input_ids) // 4 for window in windows]
    known = not looked.windows.HasField("passage")
    steps = [
        Step(
            "explain: tokenizer",
            "made the windows again" + (" from tokens that were kept" if known else ""),
            round(milliseconds.get("tokenizer", 0.0), 3),
            "hit" if known else "miss",
            f"{_windows(len(windows))} of up to {max(sizes)} tokens",
        ),
        Step(
            "explain: stages",
            "computed the logits of all windows again",
            round(
                sum(v for k, v in milliseconds.items() if k[:5] in ("stage", "queue", "links")), 3
            ),
            None,
            f"[{sum(sizes)} tokens, 2]",
        ),
        Step(
            "explain: read",
            _why_this_window(window, window_logits),
            round(milliseconds.get("read", 0.0), 3),
            None,
            _windows(len(windows)),
        ),
    ]
    tokens = sizes[window]
    for share in explained.stages:
        last = share.stage == len(explained.stages) - 1
        did = "ran the window forwards and its gradients backwards, and kept its attention"
        sent = "" if last else f", {share.link_bytes:,} bytes to and from the next stage"
        steps.append(
            Step(
                f"explain: stage {share.stage}",
                did,
                share.compute_micros / 1000,
                None,
                f"layers {share.first_layer}–{share.end_layer - 1}, {share.tokens} tokens in "
                f"windows of {tokens}{sent}",
            )
        )
    steps.append(
        Step(
            "explain: total",
            f"took gradients at {explained.points} points between the baseline and the text",
            round(clock.elapsed() * 1000, 3),
            None,
            None,
        )
    )
    return steps


def _why_this_window(window: int, logits: Sequence[float]) -> str:
    if len(logits) == 1:
        return "there was one window, which holds the answer"
    others = sorted((value for i, value in enumerate(logits) if i != window), reverse=True)
    return (
        f"window {window + 1} of {len(logits)} gives the answer: its best span has the logit "
        f"{logits[window]:.2f}, the best of the others {others[0]:.2f}"
    )


def _windows(count: int) -> str:
    return f"{count} window" + ("s" if count > 1 else "")
