"""Vectors by the gateway's way, against sentence-transformers' recipe spelled out."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from miaotui.retrieval.encoder import EncoderError, EncoderTokenizer, bundled_folder
from tests.encoder import EncoderStage, open_encoder

TEXTS = [
    "Who built the tower?",
    "The tower was built by an engineer whose company was known for bridges. " * 3,
    "long " * 600,
    "Who built the bridge?",
    "鲁迅",
    *("one more sentence " * count for count in range(40, 50)),
]


async def test_vectors_are_the_mean_over_tokens_scaled_to_length_one(
    encoder_stage: EncoderStage,
) -> None:
    pair, encoder = await open_encoder(encoder_stage.address)
    try:
        vectors = await encoder.passages(TEXTS)
        alone = encoder.question(TEXTS[1])
        assert vectors is not None
        assert alone is not None
        assert vectors.shape == (len(TEXTS), 384)
        assert vectors.dtype == np.float32
        question = await asyncio.wrap_future(alone)
        assert question == pytest.approx(vectors[1], abs=2e-5)
    finally:
        await pair.close()
    folder = bundled_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    for text, vector in zip(TEXTS, vectors, strict=True):
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        with torch.inference_mode():
            mean = model(**inputs).last_hidden_state[0].mean(0)
        assert vector == pytest.approx((mean / mean.norm()).numpy(), abs=2e-5)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError):
        EncoderTokenizer(tmp_path)
