"""Chooses tokens from logits, at the last stage.

Every draw depends on a sequence's seed and the token's position alone, so a sequence that is
computed again, or whose tokens are verified ahead, gets the same tokens. The filters are those
of transformers' logits processors, of which top-k (Fan et al., 2018), top-p (Holtzman et al.,
2020, arXiv:1904.09751) and min-p (Nguyen et al., 2024, arXiv:2407.01082) come down to one
threshold on a row's logits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from miaotui.engine.decode.filters import Choice, draw_tokens
from miaotui.engine.decode.grammar import Grammars, Matcher, SchemaError
from miaotui.engine.decode.suppression import Suppression
from miaotui.engine.decode.types import (
    PlaceLogprobs,
    SampledTokens,
    SamplingParams,
    SequenceStart,
)
from miaotui.models.errors import BatchError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SampleRows:
    """Rows of logits to sample for one sequence: 1 + len(draft), one after another.

    `position` is that of the first token to be sampled; `draft` the tokens guessed from there.
    """

    sequence_id: int
    position: int
    draft: Sequence[int] = ()


@dataclass(slots=True)
class _Sequence:
    """What is kept of a sequence between batches."""

    params: SamplingParams
    seen: set[int]
    """Tokens of prompt and text; empty unless a repetition penalty needs them."""
    counts: dict[int, int] = field(default_factory=dict)
    """How often each token is in the text; empty unless a penalty needs it."""
    bias: tuple[torch.Tensor, torch.Tensor] | None = None
    matcher: Matcher | None = None
    failed: bool = False
    """Whether its grammar cannot be followed: it ends at once."""
    simple: bool = False
    """Whether nothing but the most probable token is asked for."""
    begins: bool = False
    """Whether the next token is the text's first."""

    @classmethod
    def of(cls, start: SequenceStart, device: torch.device) -> _Sequence:
        params = start.sampling
        bias = None
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=device)
            values = torch.tensor(list(params.logit_bias.values()), device=device)
            bias = ids, values
        simple = (
            params.greedy and params.logprobs is None and bias is None and not params.needs_history
        )
        made = cls(params, set(), bias=bias, simple=simple, begins=not len(start.written))
        if params.repetition_penalty != 1.0:
            made.seen.update(start.prompt.tolist())
        for token in start.written.tolist():
            made.add(token)
        return made

    def follow(self, grammars: Grammars | None, start: SequenceStart) -> None:
        """Follow the schema, if there is one, from what was written."""
        schema = self.params.json_schema
        if not schema:
            return
        try:
            if grammars is None:
                raise SchemaError("this stage has no tokenizer")
            self.matcher = grammars.matcher(schema, start.written.tolist())
        except SchemaError as error:
            # The others in the batch must not suffer; such a text ends with its next token.
            log.error("a text that was to fit a JSON schema ends: %s", error)
            self.failed = True

    def add(self, token: int) -> None:
        """Take note of a token of the text."""
        params = self.params
        if params.repetition_penalty != 1.0:
            self.seen.add(token)
        if params.presence_penalty or params.frequency_penalty:
            self.counts[token] = self.counts.get(token, 0) + 1
        if self.matcher is not None:
            self.matcher.accept(token)
            if self.matcher.error:
                log.error("a JSON schema cannot be followed any further: %s", self.matcher.error)
                self.matcher, self.failed = None, True

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return self.failed or (self.matcher is not None and self.matcher.complete)

    def penalise(self, row: torch.Tensor) -> None:
        """Apply the penalties to a row of logits [vocab_size], in place."""
        params = self.params
        if self.seen:
            ids = torch.tensor(sorted(self.seen), device=row.device)
            picked = row[ids]
            factor = params.repetition_penalty
            row[ids] = torch.where(picked < 0, picked * factor, picked / factor)
        if self.counts:
            ids = torch.tensor(list(self.counts), device=row.device)
            counts = torch.tensor(list(self.counts.values()), device=row.device)
            row[ids] -= params.frequency_penalty * counts + params.presence_penalty


class Sampler:
    """Keeps what sequences need to be sampled, and samples them. For one thread at a time."""

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        grammars: Grammars | None = None,
        suppression: Suppression | None = None,
    ) -> None:
        """Take the model's vocabulary size and the device that logits come on.

        `grammars` follows JSON schemas; where it is missing, or a schema cannot be followed
        (callers check it before), a text ends at once. `suppression` names tokens that are not
        written whatever else is asked for.
        """
        self._vocab_size = vocab_size
        self._device = device
        self._grammars = grammars
        self._suppression = suppression
        self._sequences: dict[int, _Sequence] = {}

    def __len__(self) -> int:
        """Sequences that are kept."""
        return len(self._sequences)

    def begin(self, sequence_id: int, start: SequenceStart) -> None:
        """Keep a sequence that starts, or starts again.

        Raises:
            BatchError: a biased token is not in the vocabulary.
        """
        biased = start.sampling.logit_bias
        if biased and not all(0 <= token < self._vocab_size for token in biased):
            raise BatchError(f"logit_bias names tokens that are not in 0 to {self._vocab_size - 1}")
        sequence = _Sequence.of(start, self._device)
        sequence.follow(self._grammars, start)
        self._sequences[sequence_id] = sequence

    def release(self, sequence_ids: Iterable[int]) -> None:
        """Forget sequences; unknown ones do not matter."""
        for sequence_id in sequence_ids:
            self._sequences.pop(sequence_id, None)

    def sample(self, logits: torch.Tensor, rows: Sequence[SampleRows]) -> list[SampledTokens]:
        """Sample at least one token for each sequence.

        A draft's tokens are accepted as long as each equals the one that is sampled in its
        place, so that the result is what sampling without a draft would have been.

        Args:
            logits: float32 [n, vocab_size], the sequences' rows one after another. May be changed.
            rows: which those are.

        Raises:
            BatchError: a sequence has not begun, or the rows do not add up.
        """
        if sum(1 + len(item.draft) for item in rows) != len(logits):
            raise BatchError(f"{len(logits)} rows of logits do not fit the sequences' drafts")
        known = [self._known(item.sequence_id) for item in rows]
        if self._suppression is not None:
            self._suppress(self._suppression, logits, known, rows)
        if all(sequence.simple for sequence in known):
            return _verify_greedy(logits.argmax(-1).tolist(), rows)
        results = [SampledTokens(item.sequence_id, np.zeros(0, np.int32)) for item in rows]
        tokens: list[list[int]] = [[] for _ in rows]
        firsts = np.cumsum([0, *(1 + len(item.draft) for item in rows)]).tolist()
        going = list(range(len(rows)))
        depth = 0
        while going:
            places = torch.tensor([firsts[i] + depth for i in going], device=logits.device)
            raw = logits if len(places) == len(logits) else logits[places]
            chosen = self._choose(raw, [known[i] for i in going], [rows[i] for i in going], depth)
            for index, row in zip(going, range(len(going)), strict=True):
                sequence, token = known[index], chosen[row]
                tokens[index].append(token)
                sequence.add(token)
                if sequence.params.logprobs is not None:
                    results[index].logprobs.append(
                        _logprobs(raw[row], token, sequence.params.logprobs)
                    )
            depth += 1
            going = [
                i
                for i in going
                if len(rows[i].draft) >= depth
                and tokens[i][-1] == rows[i].draft[depth - 1]
                and not known[i].complete
            ]
        for result, ids, sequence in zip(results, tokens, known, strict=True):
            result.token_ids = np.array(ids, np.int32)
            result.complete = sequence.complete
        return results

    def _suppress(
        self,
        suppression: Suppression,
        logits: torch.Tensor,
        sequences: Sequence[_Sequence],
        rows: Sequence[SampleRows],
    ) -> None:
        row, firsts = 0, []
        for sequence, item in zip(sequences, rows, strict=True):
            if sequence.begins:
                sequence.begins = False
                firsts.append(row)
            row += 1 + len(item.draft)
        suppression.apply(logits, firsts)

    def _known(self, sequence_id: int) -> _Sequence:
        try:
            return self._sequences[sequence_id]
        except KeyError:
            raise BatchError(f"sequence {sequence_id} has not begun at this stage") from None

    def _choose(
        self,
        raw: torch.Tensor,
        sequences: Sequence[_Sequence],
        rows: Sequence[SampleRows],
        depth: int,
    ) -> list[int]:
        """Choose one token a row of `raw` [n, vocab_size]."""
        logits = raw.clone()
        for row, sequence in enumerate(sequences):
            if sequence.bias is not None:
                ids, values = sequence.bias
                logits[row].index_add_(0, ids, values)
            if sequence.matcher is not None:
                allowed = sequence.matcher.allowed().to(logits.device)
                logits[row].masked_fill_(~allowed, -torch.inf)
            if sequence.seen or sequence.counts:
                sequence.penalise(logits[row])
        choices = [
            Choice(
                sequence.params.temperature,
                sequence.params.top_k,
                sequence.params.top_p,
                sequence.params.min_p,
                sequence.params.seed,
                item.position + depth,
            )
            for sequence, item in zip(sequences, rows, strict=True)
        ]
        return draw_tokens(logits, choices)


def _verify_greedy(best: Sequence[int], rows: Sequence[SampleRows]) -> list[SampledTokens]:
    results = []
    first = 0
    for item in rows:
        right = 0
        while right < len(item.draft) and best[first + right] == item.draft[right]:
            right += 1
        taken = np.array(best[first : first + right + 1], np.int32)
        results.append(SampledTokens(item.sequence_id, taken))
        first += 1 + len(item.draft)
    return results


def _logprobs(row: torch.Tensor, token: int, count: int) -> PlaceLogprobs:
    """Return the log probabilities of a token and of the `count` best, before any change."""
    total = torch.logsumexp(row, -1)
    chosen = token, float(row[token] - total)
    if not count:
        return PlaceLogprobs(chosen)
    values, ids = torch.topk(row, min(count, len(row)))
    pairs = zip(ids.tolist(), (values - total).tolist(), strict=True)
    return PlaceLogprobs(chosen, tuple(pairs))
