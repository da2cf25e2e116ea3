"""A checkpoint and its tokenizer of every family, made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from miaotui.text.tokenizer import TextTokenizer, load_tokenizer
from tests.checkpoints import make_config, make_tokenizer

Pair = tuple[TextTokenizer, Any]


@pytest.fixture(scope="session")
def tokenizer_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """(ours, transformers' own) of a family; of a directory without weights."""

    @cache
    def make(family: str) -> Pair:
        directory = tokenizer_directory(tmp_path_factory.mktemp(family), family)
        return load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)

    return make


def tokenizer_directory(directory: Path, family: str) -> Path:
    """Writes a tokenizer and its model's config.json."""
    tokenizer = make_tokenizer(family)
    tokenizer.save_pretrained(directory)
    make_config(family, vocab_size=len(tokenizer)).save_pretrained(directory)
    return directory
