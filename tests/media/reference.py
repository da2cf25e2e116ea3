"""Recordings and pictures, and what transformers' own models hear and see in them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image
from transformers import VisionEncoderDecoderModel, WhisperForConditionalGeneration

from miaotui.media.features import load_extractor
from tests.media.checkpoints import make_captioner_tokenizer, make_whisper_tokenizer

# What logits of tokens and of the second best must differ by: far more than rounding changes.
_GAP = 0.01
_RATE = 16_000
_NAMES = {"en": "english", "zh": "chinese", "de": "german"}


def noise(seconds: float, seed: int) -> bytes:
    """A FLAC file."""
    file = io.BytesIO()
    values = np.random.default_rng(seed).normal(0, 0.1, round(seconds * _RATE)).astype(np.float32)
    soundfile.write(file, values, _RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def speckles(seed: int) -> bytes:
    """A PNG file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def heard(directory: Path, data: bytes, language: str) -> list[str]:
    """The text of each window of a recording; `directory`: a `make_whisper`'s."""
    model: Any = WhisperForConditionalGeneration.from_pretrained(directory).eval()
    tokenizer = make_whisper_tokenizer()
    names = ("startoftranscript", language, "transcribe", "notimestamps")
    prompt = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names])
    texts = []
    for features in _inputs(directory, "audio", data):
        (ids,) = model.generate(features, language=language, task="transcribe", do_sample=False)
        _check_decisive(model, features, prompt, ids.tolist())
        texts.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    return texts


def language_of(directory: Path, data: bytes) -> str:
    """The language that is heard in a recording's first window, by its English name."""
    model: Any = WhisperForConditionalGeneration.from_pretrained(directory).eval()
    (token,) = model.detect_language(_inputs(directory, "audio", data)[0]).tolist()
    return _NAMES[make_whisper_tokenizer().convert_ids_to_tokens(token).strip("<|>")]


def seen(directory: Path, data: bytes) -> str:
    """What is told of a picture; `directory`: a `make_captioner`'s."""
    model: Any = VisionEncoderDecoderModel.from_pretrained(directory).eval()
    (pixels,) = _inputs(directory, "image", data)
    (ids,) = model.generate(pixels, max_new_tokens=20, do_sample=False, num_beams=1)
    _check_decisive(model, pixels, ids[:1].tolist(), ids[1:].tolist())
    return str(make_captioner_tokenizer().decode(ids, skip_special_tokens=True))


def _inputs(directory: Path, modality: Any, data: bytes) -> list[torch.Tensor]:
    made = load_extractor(directory, modality).extract(data)
    return [torch.from_numpy(window.values)[None] for window in made]


def _check_decisive(model: Any, inputs: torch.Tensor, prompt: list[int], text: list[int]) -> None:
    """The text is what comes of the inputs, greedily, and no token of it was close to another.

    So nothing but the model is in it, and rounding cannot change it.
    """
    rules = model.generation_config
    with torch.no_grad():
        logits = model(inputs, decoder_input_ids=torch.tensor([prompt + text[:-1]])).logits[0]
    logits = logits[len(prompt) - 1 :]
    logits[:, rules.suppress_tokens] = -torch.inf
    logits[0, rules.begin_suppress_tokens or []] = -torch.inf
    best = logits.topk(2)
    assert best.indices[:, 0].tolist() == text
    assert (best.values[:, 0] - best.values[:, 1]).min() > _GAP
