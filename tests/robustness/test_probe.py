"""Disturbances disturb, repeatably, and the report counts what stays."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from miaotui.cli.app import app
from miaotui.robustness.examples import EXAMPLES
from miaotui.robustness.perturbations import PERTURBATIONS, Item, Perturbation
from miaotui.robustness.probe import Outcome, QuestionFileError, probe, read_squad
from miaotui.robustness.scoring import plain, same_answer

BY_NAME = {perturbation.name: perturbation for perturbation in PERTURBATIONS}
ENGLISH, CHINESE = EXAMPLES[0], EXAMPLES[6]


def disturbed(name: str, item: Item, seed: int = 1) -> Item:
    found = BY_NAME[name].disturb(item, random.Random(seed))
    assert found is not None
    return found


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=lambda one: one.name)
def test_answers_stay_readable(perturbation: Perturbation) -> None:
    """Something changes, the same for the same seed, and a person could still answer."""
    applied = 0
    for item in EXAMPLES:
        first, again, other = (
            perturbation.disturb(item, random.Random(seed)) for seed in (1, 1, 2)
        )
        assert first == again
        if first is None:
            continue
        applied += 1
        assert first != item
        assert first.answers == item.answers
        assert any(answer in plain(first.context) for answer in item.answers)
        assert other is not None
    assert applied >= 6 or item.language == "zh"
    assert applied >= 2


@given(st.text(max_size=40), st.text(max_size=80), st.integers(0, 50))
def test_any_text_may_be_disturbed(question: str, context: str, seed: int) -> None:
    for perturbation in PERTURBATIONS:
        found = perturbation.disturb(Item(question, context), random.Random(seed))
        assert found is None or found != Item(question, context)


def test_what_each_does() -> None:
    typo = disturbed("typos", ENGLISH).question
    assert typo != ENGLISH.question
    assert len(typo.split()) == len(ENGLISH.question.split())
    swapped = disturbed("swapped words", ENGLISH).question
    assert sorted(swapped.split()) == sorted(ENGLISH.question.split())
    assert ENGLISH.context in disturbed("distracting sentences", ENGLISH).context
    hidden = disturbed("invisible characters", CHINESE)
    assert (plain(hidden.question), plain(hidden.context)) == (CHINESE.question, CHINESE.context)
    glyphs = disturbed("homoglyphs", ENGLISH).question
    assert any("\u0400" <= char <= "\u04ff" for char in glyphs)
    assert disturbed("full-width forms", ENGLISH).question.startswith("Ｗｈｅｎ")
    assert disturbed("other script", CHINESE).question == "魯迅出生於哪裏？"
    back = disturbed("other script", Item("魯迅出生於哪裏？", CHINESE.context))
    assert back.question == CHINESE.question
    similar = disturbed("similar characters", Item("未来的大人", "未来"), 3).question
    assert len(similar) == 5
    assert similar != "未来的大人"
    sound = disturbed("like-sounding characters", Item("他在哪里", "他"), 3).question
    assert sum(a != b for a, b in zip(sound, "他在哪里", strict=True)) == 1


def test_the_report_counts() -> None:
    """A reader that answers all but disturbed questions with typos."""
    asked: list[int] = []

    def ask(items: Sequence[Item]) -> list[Outcome]:
        asked.append(len(items))
        known = {item.question for item in EXAMPLES}
        return [
            Outcome(item.answers[0] if item.question in known else "", len(item.question) % 2 == 0)
            for item in items
        ]

    report = probe(EXAMPLES, ask)
    rows = {row.name: row for row in report.rows}
    assert report.items == asked[0] == len(EXAMPLES)
    assert rows["typos"].items == 6
    assert (rows["typos"].same, rows["typos"].f1) == (0, 0)
    assert (rows["typos"].right_before, rows["typos"].right_after) == (1, 0)
    assert (rows["distracting sentences"].same, rows["distracting sentences"].f1) == (1, 1)
    assert rows["distracting sentences"].items == 12
    assert 0 < rows["distracting sentences"].warned < 1
    assert json.loads(json.dumps(report.as_json()))["perturbations"][0]["name"] == "typos"
    assert probe(EXAMPLES, ask) == report
    with pytest.raises(ValueError, match="no questions"):
        probe([], ask)


def test_answers_unknown_are_not_scored() -> None:
    item = Item(ENGLISH.question, ENGLISH.context)
    report = probe([item], lambda items: [Outcome("1925", False)] * len(items))
    assert {row.right_before for row in report.rows} == {None}
    assert {row.same for row in report.rows} == {1}


def test_likeness_of_answers() -> None:
    assert same_answer("The 1925", ("1925",), "en") == (1, 1)
    assert same_answer("1\u200b925", ("1925",), "en") == (1, 1)
    equal, overlap = same_answer("浙江", ("浙江绍兴",), "zh")
    assert equal == 0
    assert overlap == pytest.approx(2 / 3)
    assert same_answer("", ("1925",), "en") == (0, 0)


def test_question_files(tmp_path: Path) -> None:
    file = tmp_path / "squad.json"
    qas = [{"question": f"q{i}?", "answers": [{"text": "a"}] if i % 2 else []} for i in range(20)]
    file.write_text(json.dumps({"data": [{"paragraphs": [{"context": "a b", "qas": qas}]}]}))
    items = read_squad(file, limit=5, seed=1)
    assert len(items) == 5
    assert items == read_squad(file, limit=5, seed=1)
    assert all(int(item.question[1:-1]) % 2 for item in items)
    assert len(read_squad(file, limit=100)) == 10
    for content in ("{", "[]", '{"data": [{}]}', '{"data": []}', '{"data": 3}'):
        file.write_text(content)
        with pytest.raises(QuestionFileError, match=str(file.name)):
            read_squad(file, limit=5)


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    run = CliRunner().invoke
    missing = run(app, ["probe", str(tmp_path / "none.json")])
    assert missing.exit_code == 2
    assert "cannot read" in missing.stderr
    (tmp_path / "bad.json").write_text("{}")
    bad = run(app, ["probe", str(tmp_path / "bad.json")])
    assert bad.exit_code == 2
    assert "SQuAD" in bad.stderr
    nobody = run(app, ["probe", "--url", "http://127.0.0.1:9"])
    assert nobody.exit_code == 1
    assert "cannot reach a gateway" in nobody.stderr
