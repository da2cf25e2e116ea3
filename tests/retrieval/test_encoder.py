"""The bundled encoder, against sentence-transformers' recipe spelled out with transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from miaotui.retrieval.encoder import EncoderError, SentenceEncoder, bundled_folder

TEXTS = [
    "Who built the tower?",
    "The tower was built by an engineer whose company was known for bridges. " * 3,
    "long " * 600,
    "Who built the bridge?",
    "鲁迅",
]


def test_vectors_are_the_mean_over_tokens_scaled_to_length_one() -> None:
    folder = bundled_folder()
    encoder = SentenceEncoder(folder)
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), encoder.dimensions)
    assert vectors.dtype == np.float32
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    for text, vector in zip(TEXTS, vectors, strict=True):
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        with torch.inference_mode():
            mean = model(**inputs).last_hidden_state[0].mean(0)
        assert vector == pytest.approx((mean / mean.norm()).numpy(), abs=2e-5)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    assert alone == pytest.approx(vectors, abs=2e-5)


def test_a_folder_that_is_none_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(EncoderError):
        SentenceEncoder(tmp_path_factory.mktemp("empty"))
