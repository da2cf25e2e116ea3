"""The answers that the services must give, from one unsplit model and plain Python.

Nothing of Miaotui is used here: transformers makes the windows and the logits, and the
reader below tries every span.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import exp
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

# Differences between summing in another order and a wrong answer.
TOLERANCE = 3e-4


@dataclass(frozen=True)
class Expected:
    """Every allowed span of a passage, and "no answer"."""

    context: str
    # First and last passage token to the logit.
    spans: dict[tuple[int, int], float]
    # Characters to the best logit of the spans that cover them: several tokens may share one
    # character. Spans without any characters are no answers.
    places: dict[tuple[int, int], float]
    null: float

    @cached_property
    def ranked(self) -> list[float]:
        """The answers' logits, best first."""
        return sorted(self.places.values(), reverse=True)

    @cached_property
    def _mass(self) -> float:
        return sum(map(exp, self.spans.values())) + exp(self.null)

    def check(self, body: dict[str, Any], top_k: int) -> None:
        """Fails unless `body`, as the HTTP API gives it, is the answer.

        Spans whose logits differ by less than the tolerance may stand in either order.
        """
        answers = body["answers"]
        assert len(answers) == min(top_k, len(self.ranked))
        assert body["answerable"] is True
        assert abs(body["no_answer_score"] - (self.null - max(self.spans.values()))) < TOLERANCE
        for answer, best in zip(answers, self.ranked, strict=False):
            place = (answer["start"], answer["end"])
            assert answer["text"] == self.context[slice(*place)]
            assert abs(answer["logit"] - best) < TOLERANCE
            assert abs(answer["logit"] - self.places[place]) < TOLERANCE
            assert abs(answer["score"] - exp(best) / self._mass) < TOLERANCE


class Reference:
    """One whole model."""

    def __init__(self, directory: Path, *, max_length: int, stride: int) -> None:
        """`max_length` and `stride` in tokens, as the tokenizer service has them."""
        # On cores that the services compute on, OpenMP's threads would mostly wait for each other.
        torch.set_num_threads(1)
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForQuestionAnswering.from_pretrained(directory, dtype=torch.float32)
        self._model = model.eval()
        self._max_length = max_length
        self._stride = stride

    def answer(self, question: str, context: str, *, longest: int = 30) -> Expected:
        """Reads all spans of up to `longest` tokens."""
        room = self._room(question)
        stride = min(self._stride, room // 2)
        encoded = self._tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=self._max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        spans: dict[tuple[int, int], float] = {}
        characters: dict[tuple[int, int], tuple[int, int]] = {}
        nulls = []
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        for window in range(len(encoded["input_ids"])):
            # One at a time and whole, so without any padding.
            inputs = {name: torch.tensor([encoded[name][window]]) for name in names}
            with torch.inference_mode():
                output = self._model(**inputs)
            starts, ends = output.start_logits[0].tolist(), output.end_logits[0].tolist()
            nulls.append(starts[0] + ends[0])
            offsets = encoded["offset_mapping"][window]
            passage = [i for i, side in enumerate(encoded.sequence_ids(window)) if side == 1]
            # Where the window's first passage token stands in the passage.
            begin = window * (room - stride) - passage[0]
            for first in passage:
                for last in range(first, min(first + longest, passage[-1] + 1)):
                    span = (begin + first, begin + last)
                    logit = starts[first] + ends[last]
                    spans[span] = max(logit, spans.get(span, logit))
                    characters[span] = (offsets[first][0], offsets[last][1])
        places: dict[tuple[int, int], float] = {}
        for span, (start, end) in characters.items():
            # Some tokenizers count the space before a word to it.
            start += len(context[start:end]) - len(context[start:end].lstrip())
            end = start + len(context[start:end].rstrip())
            if start < end:
                places[start, end] = max(spans[span], places.get((start, end), spans[span]))
        return Expected(context, spans, places, min(nulls))

    def _room(self, question: str) -> int:
        tokens: int = len(self._tokenizer(question, add_special_tokens=False)["input_ids"])
        special: int = self._tokenizer.num_special_tokens_to_add(pair=True)
        return self._max_length - tokens - special
