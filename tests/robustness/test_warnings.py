"""Unusual input is noticed, ordinary input is not, and neither takes time."""

from __future__ import annotations

import time

import pytest

from miaotui.robustness.scripts import code_points, count_pieces, count_scripts
from miaotui.robustness.warnings import look_at_input, repeated_share
from tests.checkpoints import EXAMPLES

PIECES = {"Latin": 26_000, "Han": 6_000, "Kana": 184, "Cyrillic": 8}
ENGLISH, CHINESE = EXAMPLES[0], EXAMPLES[3]


def kinds(question: str, passage: str, unknown: float = 0.0) -> dict[str, float]:
    found = look_at_input(question, passage, unknown_share=unknown, script_pieces=PIECES)
    assert all(0 < one.score <= 1 and one.message for one in found)
    return {one.kind: one.score for one in found}


@pytest.mark.parametrize(("question", "passage"), EXAMPLES)
def test_ordinary_input_gives_no_warning(question: str, passage: str) -> None:
    assert kinds(question, passage) == {}


@pytest.mark.parametrize(
    ("question", "passage"),
    [
        ("What is the α-helix?", "The α-helix is 5 μm long; Δx was 3 Ω. Naïve café, Ångström."),
        ("谁在ＮＢＡ打球？", "ＮＢＡ是美国的职业篮球联赛。👩‍👩‍👧 👍🏽\n第二行\t制表"),
        ("Who?", "Line one.\nLine two.\r\n\tTabbed — “quoted” … €5"),
        ("क्या?", "x" * 50),
    ],
)
def test_legitimate_mixtures_give_none(question: str, passage: str) -> None:
    assert kinds(question, passage) == {}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("The tow\u200ber", "invisible_characters"),
        ("The to\u200dwer", "invisible_characters"),
        ("The tow\x07er", "invisible_characters"),
        ("北京\u2060是首都", "invisible_characters"),
        ("The \U000e0041tower", "invisible_characters"),
        ("The \u202erewot\u202c stands", "direction_controls"),
        ("The Еiffel Tоwer", "homoglyphs"),  # Cyrillic Е and о
        ("The Tοwer", "homoglyphs"),  # Greek omicron
        ("The Tｏwer", "homoglyphs"),  # full width
        ("The T𝐨wer", "homoglyphs"),  # mathematical bold
        ("⽔在⼭上", "homoglyphs"),  # Kangxi radicals
    ],
)
@pytest.mark.parametrize("in_question", [True, False])
def test_odd_characters_are_noticed(text: str, kind: str, in_question: bool) -> None:
    question, passage = (text, ENGLISH[1]) if in_question else (ENGLISH[0], text)
    assert kind in kinds(question, passage)


def test_more_of_it_scores_higher() -> None:
    few = kinds("Where?", "tow\u200ber " * 1 + "tower " * 40)["invisible_characters"]
    many = kinds("Where?", "tow\u200ber " * 9 + "tower " * 40)["invisible_characters"]
    assert few < many


def test_scripts_that_the_vocabulary_lacks() -> None:
    assert "unfamiliar_script" in kinds("Где стоит башня?", "Башня стоит в Париже, во Франции.")
    assert "unfamiliar_script" not in kinds("Who is Иван?", ENGLISH[1])
    assert "unfamiliar_script" not in kinds(*CHINESE)
    assert look_at_input("Где?", "Башня в Париже.", script_pieces=None) == []


def test_unknown_tokens() -> None:
    assert kinds(*ENGLISH, unknown=0.04) == {}
    assert kinds(*ENGLISH, unknown=0.3) == {"unknown_tokens": 0.3}


@pytest.mark.parametrize("piece", ["ab", "The tower. ", "北京是首都。", ENGLISH[1], "x" * 10])
def test_repetition(piece: str) -> None:
    text = piece * (2000 // len(piece))
    assert repeated_share(text) > 0.8
    assert "repetition" in kinds("Where is it?", text)


def test_ordinary_text_does_not_repeat() -> None:
    for _, passage in EXAMPLES:
        assert repeated_share(passage) < 0.3
    assert repeated_share(" ".join(passage for _, passage in EXAMPLES)) < 0.3


def test_lengths() -> None:
    assert "unusual_length" in kinds("What is it? " + "word " * 100, ENGLISH[1])
    assert "unusual_length" in kinds("北" * 100, CHINESE[1])
    assert "unusual_length" not in kinds("What is it that " + "word " * 40, ENGLISH[1])


def test_scripts_are_counted() -> None:
    assert count_scripts(code_points("123 。")) == {}
    assert count_scripts(code_points("Tower 北京 é башня かな가")) == {
        "Latin": 6,
        "Cyrillic": 5,
        "Hangul": 1,
        "Kana": 2,
        "Han": 2,
    }
    pieces = count_pieces(["the", "##a", "北", "b", "да", "д", "[SEP]"])
    assert (pieces["Latin"], pieces["Han"], pieces["Cyrillic"]) == (2, 1, 1)


@pytest.mark.parametrize(("question", "passage"), [EXAMPLES[2], EXAMPLES[4]])
def test_it_costs_next_to_nothing(question: str, passage: str) -> None:
    text = passage * (1200 // len(passage))
    look_at_input(question, text, script_pieces=PIECES)
    best = float("inf")
    for _ in range(20):
        began = time.thread_time_ns()
        for _ in range(10):
            look_at_input(question, text, script_pieces=PIECES)
        best = min(best, (time.thread_time_ns() - began) / 10)
    assert best < 500_000, f"{best / 1000:.0f} µs of CPU"
