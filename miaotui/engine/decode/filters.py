"""Temperature, top-k, top-p and min-p, and the draw from what they leave.

Each filter keeps a row's most probable tokens, so each is a threshold on its logits, and so are
all of them together: the highest threshold. It is found among the few largest logits where they
suffice, and tokens that are as probable as the last one kept are kept too, so that nothing
depends on how a sort breaks ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Logits looked at for a threshold before the whole vocabulary is sorted.
_CANDIDATES = 256

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Choice:
    """How one token is chosen; temperature 0 takes the most probable. See `SamplingParams`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    position: int

    @property
    def filtered(self) -> bool:
        """Whether some tokens are ruled out."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def draw_tokens(logits: torch.Tensor, choices: Sequence[Choice]) -> list[int]:
    """Return one token id a row.

    Args:
        logits: float32 [n, vocab_size]; -inf where a token is not allowed. May be changed.
        choices: how each row's token is chosen.
    """
    greedy = [i for i, choice in enumerate(choices) if choice.temperature == 0.0]
    if len(greedy) == len(choices):
        tokens: list[int] = logits.argmax(-1).tolist()
        return tokens
    result = [0] * len(choices)
    if greedy:
        best = logits[greedy].argmax(-1).tolist()
        for index, token in zip(greedy, best, strict=True):
            result[index] = token
    drawn = [i for i in range(len(choices)) if choices[i].temperature != 0.0]
    rows = logits if len(drawn) == len(choices) else logits[drawn]
    temperatures = torch.tensor([choices[i].temperature for i in drawn], device=logits.device)
    rows = rows / temperatures[:, None]
    filtered = [row for row, i in enumerate(drawn) if choices[i].filtered]
    if filtered:
        limits = thresholds(rows[filtered], [choices[drawn[row]] for row in filtered])
        kept = rows[filtered]
        rows[filtered] = kept.masked_fill(kept < limits[:, None], -torch.inf)
    for index, token in zip(drawn, _draw(rows, [choices[i] for i in drawn]), strict=True):
        result[index] = token
    return result


def thresholds(logits: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    """Return the lowest logit that each row keeps, float32 [n].

    Args:
        logits: float32 [n, vocab_size], after the temperature.
        choices: each row's filters, applied as top-k, then top-p, then min-p.
    """
    vocabulary = logits.shape[1]
    top_k = torch.tensor(
        [min(c.top_k, vocabulary) if c.top_k > 0 else vocabulary for c in choices],
        device=logits.device,
    )
    top_p = torch.tensor([c.top_p for c in choices], device=logits.device, dtype=torch.float64)
    min_p = torch.tensor([c.min_p for c in choices], device=logits.device)
    wanted = max((c.top_k for c in choices), default=0)
    count = min(vocabulary, max(_CANDIDATES, wanted))
    while True:
        ranked = torch.topk(logits, count).values
        limited = top_k < vocabulary
        kth = ranked.gather(1, (top_k.clamp(max=count) - 1)[:, None])[:, 0]
        limit = torch.where(limited, kth, torch.full_like(kth, -torch.inf))
        total = torch.where(
            limited,
            torch.logsumexp(ranked.masked_fill(ranked < limit[:, None], -torch.inf), -1),
            torch.logsumexp(logits, -1),
        )
        mass = (ranked - total[:, None]).double().exp().cumsum(-1)
        # Is the probability of all that is more probable than a token below top_p? The first
        # always is.
        before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], -1)
        inside = before < top_p[:, None]
        inside[:, 0] = True
        nucleus = top_p < 1.0
        if count == vocabulary or not bool((nucleus & ~limited & inside[:, -1]).any()):
            break
        count = min(vocabulary, count * 16)
    last = ranked.gather(1, inside.sum(-1, keepdim=True) - 1)[:, 0]
    limit = torch.where(nucleus, torch.maximum(limit, last), limit)
    # p >= min_p * p_max, in logarithms; log 0 is -inf and keeps all.
    return torch.maximum(limit, ranked[:, 0] + min_p.log())


def uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1) that is drawn at a position (SplitMix64; Steele et al., 2014)."""
    return (_mix(_mix(seed) + position * _GAMMA) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _draw(logits: torch.Tensor, choices: Sequence[Choice]) -> list[int]:
    """Draw from the rows' softmax by inverting its distribution function, in order of ids."""
    sums = torch.softmax(logits, -1).cumsum(-1, dtype=torch.float64)
    points = [[uniform(choice.seed, choice.position)] for choice in choices]
    target = torch.tensor(points, dtype=torch.float64, device=logits.device) * sums[:, -1:]
    # The first token whose sum exceeds the target: one of probability 0 adds nothing to the sum
    # and is never it.
    found = torch.searchsorted(sums, target, right=True)
    tokens: list[int] = found[:, 0].clamp(max=logits.shape[1] - 1).tolist()
    return tokens
