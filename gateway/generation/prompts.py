"""What a decoder is told for a question over passages; other prompts: scenarios.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_KANA_OR_HANGUL = re.compile("[\u3040-\u30ff\uac00-\ud7af]")


@dataclass(frozen=True, slots=True)
class QuestionPrompt:
    """How a question over numbered passages is put."""

    template: str
    """With `{passages}` and `{question}`."""
    lead: str
    """Begins the answer, for a model without a chat template."""
    nothing: str
    """What the model says where the passages hold no answer."""


ENGLISH = QuestionPrompt(
    template=(
        "Answer the question by the numbered passages below, and by nothing else. Answer in one "
        "full sentence, in the question's language, and write the number of each passage that "
        "the answer rests on in square brackets at its end, such as [2]. Use the passages' own "
        "words for names, numbers and dates. If the passages do not hold the answer, write only: "
        "The text does not say.\n\n"
        "Passages:\n{passages}\n\nQuestion: {question}"
    ),
    lead="\n\nAnswer:",
    nothing="The text does not say",
)
CHINESE = QuestionPrompt(
    template=(
        "只根据下面带编号的资料回答问题。用一句完整的话作答，并在句末用方括号注明所依据的资料"
        "编号，例如[2]。人名、数字和日期照资料原文书写。如果资料中没有答案，只写：文中没有提到。"
        "\n\n资料：\n{passages}\n\n问题：{question}"
    ),
    lead="\n\n回答：",
    nothing="文中没有提到",
)


def question_prompt(question: str) -> QuestionPrompt:
    """The prompt in the question's language: Chinese, or else English."""
    return CHINESE if is_chinese(question) else ENGLISH


def is_chinese(text: str) -> bool:
    """Whether a text is to be spoken of in Chinese: it has Chinese characters, and no kana."""
    return _HAN.search(text) is not None and _KANA_OR_HANGUL.search(text) is None


def filled(prompt: QuestionPrompt, question: str, passages: Sequence[str]) -> str:
    """The prompt's text. Nothing in question or passages is taken for a placeholder."""
    numbered = "\n".join(
        f"[{number}] {' '.join(passage.split())}" for number, passage in enumerate(passages, 1)
    )
    before, _, rest = prompt.template.partition("{passages}")
    between, _, after = rest.partition("{question}")
    return f"{before}{numbered}{between}{question}{after}"
