"""Ready prompts: what a decoder is told for a translation, a summary, and the like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from gateway.generation.prompts import is_chinese

ScenarioName: TypeAlias = Literal["answer", "chat", "summarise", "translate", "write"]


@dataclass(frozen=True, slots=True)
class Scenario:
    """An instruction in both languages, each with `{to}` where `needs_target`."""

    title: Mapping[str, str]
    instruction: Mapping[str, str]
    needs_target: bool = False
    whole_chat: bool = False
    """Whether the instruction stands before the first message and not before the last."""

    def before(self, text: str, to: str | None = None) -> str:
        """The instruction in the language of `text`, which it precedes. `to`: a language."""
        language = "zh" if is_chinese(text) else "en"
        before, placeholder, after = self.instruction[language].partition("{to}")
        if placeholder:
            before += _name(to or _other(text), language) + after
        return f"{before}\n\n{text}"


SCENARIOS: Mapping[ScenarioName, Scenario] = {
    "answer": Scenario(
        title={"en": "Answer a question", "zh": "回答问题"},
        instruction={
            "en": "Answer the question below briefly and to the point, in its own language. If a "
            "text is given with it, use that text only. If you do not know the answer, say so.",
            "zh": "简明扼要地用问题的语言回答下面的问题。如果附有资料，只根据资料回答。"
            "如果不知道答案，就直说不知道。",
        },
    ),
    "chat": Scenario(
        title={"en": "Chat", "zh": "聊天"},
        instruction={
            "en": "You are a friendly, honest assistant. Answer in the language of the person who "
            "writes to you, in a few sentences, and say so where you are not sure.",
            "zh": "你是一位友好、诚实的助手。用对方使用的语言回答，几句话即可；"
            "没有把握时请直接说明。",
        },
        whole_chat=True,
    ),
    "summarise": Scenario(
        title={"en": "Summarise a text", "zh": "概括文章"},
        instruction={
            "en": "Summarise the text below in at most three sentences, in its own language. Keep "
            "names, numbers and dates as they are, and add nothing that it does not say. Write "
            "only the summary.",
            "zh": "用原文的语言，以不超过三句话概括下面的文字。人名、数字和日期保持原样，"
            "不要添加原文没有的内容。只写概括。",
        },
    ),
    "translate": Scenario(
        title={"en": "Translate a text", "zh": "翻译"},
        instruction={
            "en": "Translate the text below into {to}. Keep its meaning, tone, names, numbers and "
            "paragraphs. Write only the translation.",
            "zh": "把下面的文字翻译成{to}。保持原意、语气、人名、数字和分段。只写译文。",
        },
        needs_target=True,
    ),
    "write": Scenario(
        title={"en": "Write a text", "zh": "写作"},
        instruction={
            "en": "Write a well-structured text as described below, in the language of the "
            "description. Write only the text itself, without remarks about it.",
            "zh": "按照下面的要求，用要求所用的语言写一篇结构清楚的文字。只写正文，不要附加说明。",
        },
    ),
}

# By code, in English and in Chinese; a language that is not here is named as the caller does.
_LANGUAGES = {
    "ar": ("Arabic", "阿拉伯语"),
    "de": ("German", "德语"),
    "en": ("English", "英语"),
    "es": ("Spanish", "西班牙语"),
    "fr": ("French", "法语"),
    "it": ("Italian", "意大利语"),
    "ja": ("Japanese", "日语"),
    "ko": ("Korean", "韩语"),
    "pt": ("Portuguese", "葡萄牙语"),
    "ru": ("Russian", "俄语"),
    "zh": ("Chinese", "中文"),
}


def _name(language: str, told_in: str) -> str:
    names = _LANGUAGES.get(language.lower())
    return language if names is None else names[told_in == "zh"]


def _other(text: str) -> str:
    """What a text is translated into where nothing is said."""
    return "en" if is_chinese(text) else "zh"
