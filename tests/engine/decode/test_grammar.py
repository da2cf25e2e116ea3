"""JSON schemas: which are refused, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from miaotui.engine.decode.grammar import (
    Grammars,
    SchemaError,
    check_json_schema,
    stop_token_ids,
)
from tests.decoder_checkpoints import make_decoder_tokenizer


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("nope", "not a JSON schema"),
        ("[1]", "neither an object nor a boolean"),
        ('{"type": "strin"}', "Invalid type: strin"),
        ('{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        ('{"$ref": "#/x"}', "does not exist"),
        ('{"not": {"type": "string"}}', "Unimplemented"),
        ('{"a":' * 5000, "not a JSON schema"),
        ("[" * 100_000, "not a JSON schema"),
    ],
)
def test_schemas_that_cannot_be_followed(schema: str, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        check_json_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        "{}",
        "true",
        '{"type": "object"}',
        '{"enum": ["a", "北京"]}',
        '{"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"const": 1}}}',
    ],
)
def test_schemas_that_can(schema: str) -> None:
    check_json_schema(schema)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    make_decoder_tokenizer().save_pretrained(made)
    (made / "config.json").write_text('{"eos_token_id": 2}')
    return made


def test_a_text_may_end_only_where_its_value_does(directory: Path) -> None:
    tokenizer = make_decoder_tokenizer()
    grammars = Grammars(directory, len(tokenizer))
    matcher = grammars.matcher('{"type": "integer"}')
    assert not matcher.allowed()[2]
    for digit in tokenizer.encode("17", add_special_tokens=False):
        matcher.accept(digit)
    assert matcher.allowed()[2]  # it may end, or go on
    assert matcher.allowed().sum() > 10
    assert not matcher.complete
    fixed = grammars.matcher('{"enum": ["北京"]}')
    for token in tokenizer.encode('"北京"', add_special_tokens=False):
        assert not fixed.complete
        assert fixed.allowed()[token]
        fixed.accept(token)
    assert fixed.complete
    assert fixed.allowed().nonzero()[:, 0].tolist() == [2]


def test_random_walks_give_json(directory: Path) -> None:
    tokenizer = make_decoder_tokenizer()
    grammars = Grammars(directory, len(tokenizer))
    schema = '{"type": "array", "items": {"enum": ["a", 1, null]}, "maxItems": 4}'
    random = np.random.default_rng(0)
    for _ in range(10):
        matcher = grammars.matcher(schema)
        tokens: list[int] = []
        while not matcher.complete:
            token = int(random.choice(matcher.allowed().numpy().nonzero()[0]))
            matcher.accept(token)
            tokens.append(token)
        assert set(json.loads(tokenizer.decode(tokens))) <= {"a", 1, None}


def test_matchers_are_apart_and_compiled_once(directory: Path) -> None:
    tokenizer = make_decoder_tokenizer()
    grammars = Grammars(directory, len(tokenizer))
    schema = '{"enum": ["ab", "cd"]}'
    one, two = grammars.matcher(schema), grammars.matcher(schema)
    before = two.allowed()
    one.accept(tokenizer.encode('"', add_special_tokens=False)[0])
    assert (two.allowed() == before).all()
    assert not (one.allowed() == before).all()
    for index in range(200):
        grammars.matcher(f'{{"const": {index}}}')
    assert len(grammars._compiled) == 64


def test_what_was_written_must_fit(directory: Path) -> None:
    grammars = Grammars(directory, 640)
    with pytest.raises(SchemaError, match="so far does not fit"):
        grammars.matcher('{"const": 1}', [300, 301])


def test_stop_tokens_come_from_the_models_files(tmp_path: Path) -> None:
    assert stop_token_ids(tmp_path) == ()
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert stop_token_ids(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert stop_token_ids(tmp_path) == (7, 8)
    with pytest.raises(SchemaError, match="no tokenizer"):
        Grammars(tmp_path, 100).matcher("{}")
