"""What is asked, with the answers that are right.

Answers in a passage and greedy texts are computed beforehand by transformers, unsplit; sampled
texts and answers from documents are what the services gave before anything disturbed them: from
documents once without the encoder, found by words, and once with it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miaotui.retrieval.encoder import bundled_folder
from tests.checkpoints import EXAMPLES, make_checkpoint
from tests.decoder_checkpoints import make_decoder, make_decoder_tokenizer
from tests.e2e import generating, reference
from tests.e2e.asking import Question, questions
from tests.soak.deployment import Models

COLLECTION = "soak"
BUNDLED = Path(__file__).parent.parent.parent / "miaotui" / "bundled" / "qa"
# Documents are found by their words or, where the encoder serves, by their meaning, too.
WORDS, MEANING = "words", "meaning"
# In other words than the documents'.
_MEANT = (
    "Which monument in the French capital did an iron company put up?",
    "Which lady novelist told the story of a girl with hasty opinions?",
    "What is Asia's biggest stream?",
    "Which deep learning framework did Meta release?",
)
# What the tokenizer service makes windows of, unless told otherwise.
MAX_LENGTH, STRIDE = 384, 128
_PROMPTS = (
    "The Eiffel Tower is",
    "长江发源于青藏高原的唐古拉山脉,",
    "Once upon a time, in the north of the country,",
    "北京是中华人民共和国的首都,也是",
    "The third-longest river in the world",
    "亚洲第一长河",
    "An engineer, whose company built it from 1887 to 1889,",
    "Jane Austen wrote",
)


@dataclass(frozen=True)
class QuestionCase:
    """A question over a passage."""

    asked: Question
    expected: reference.Expected

    def check(self, body: dict[str, Any]) -> None:
        """Raises `AssertionError` where the answer is not right."""
        self.expected.check(body, self.asked.top_k)


@dataclass
class TextCase:
    """A prompt; `expected` of a sampled text is set by the first, undisturbed run."""

    body: dict[str, Any]
    expected: str | None = None

    @property
    def operation(self) -> str:
        """Its name in the report."""
        return "greedy text" if self.body["temperature"] == 0 else "seeded text"


@dataclass
class DocumentCase:
    """A question over the documents; right is what came while nothing disturbed.

    `expected`: of each way to find documents, `WORDS` and `MEANING`, the answers with their places.
    `meant`: it has few of the documents' words or none, so that words may find nothing.
    """

    question: str
    meant: bool = False
    expected: dict[str, list[tuple[str, str, int, int]]] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The HTTP request."""
        return {"question": self.question, "collection": COLLECTION, "top_k": 3}

    @staticmethod
    def seen(body: dict[str, Any]) -> list[tuple[str, str, int, int]]:
        """The answers with their places."""
        return [(a["source"], a["text"], a["start"], a["end"]) for a in body["answers"]]

    @staticmethod
    def way(body: dict[str, Any]) -> str:
        """How the documents were found."""
        return MEANING if body["dense"] == "used" else WORDS


@dataclass
class Cases:
    """Everything that is asked."""

    questions: Sequence[QuestionCase]
    texts: Sequence[TextCase]
    documents: Sequence[DocumentCase]


def make_models(directory: Path, *, tiny: bool) -> Models:
    """The bundled model, or a tiny one with random weights, a tiny decoder, the bundled encoder."""
    qa = make_checkpoint(directory / "tiny-qa") if tiny else BUNDLED
    gen = make_decoder(directory / "tiny-decoder", "qwen3", layers=4)
    return Models(qa, gen, bundled_folder())


def make_cases(models: Models, *, count: int, seed: int) -> Cases:
    """`count` questions, half as many texts, and a few questions over documents."""
    whole = reference.Reference(models.qa, max_length=MAX_LENGTH, stride=STRIDE)
    asked = questions(count, seed)
    return Cases(
        [QuestionCase(one, whole.answer(one.question, one.context)) for one in asked],
        _texts(models, count // 2, seed),
        [
            *(DocumentCase(question) for question, _ in EXAMPLES),
            *(DocumentCase(question, meant=True) for question in _MEANT),
        ],
    )


def _texts(models: Models, count: int, seed: int) -> list[TextCase]:
    chance = random.Random(seed)
    if models.gen is None:
        return []
    whole = generating.Reference(models.gen)
    tokenizer = make_decoder_tokenizer()
    made: list[TextCase] = []
    while len(made) < count:
        begin = chance.choice(_PROMPTS)
        prompt = f"{begin} {chance.randrange(10_000)} "
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": chance.choice((8, 32, 96)),
            "temperature": chance.choice((0, 0, 0.9)),
            "ignore_eos": True,
            "stream": True,
        }
        if body["temperature"]:
            made.append(TextCase({**body, "seed": chance.randrange(2**31), "top_p": 0.95}))
            continue
        ids = tuple(tokenizer(prompt)["input_ids"])
        greedy = generating.Prompt(ids, body["max_tokens"], ())
        # Where two tokens are equally good, sums in another order may choose either.
        if whole.decided([greedy]):
            text = tokenizer.decode(whole.write(greedy), skip_special_tokens=True)
            made.append(TextCase(body, text))
    return made


def documents() -> list[tuple[str, str]]:
    """Sources and texts of the documents."""
    return [(f"example-{index}.txt", passage) for index, (_, passage) in enumerate(EXAMPLES)]
