"""`miaotui up --transcriber --captioner`, as a user runs it, against transformers' own texts."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
import torch
from PIL import Image
from transformers import VisionEncoderDecoderModel, WhisperForConditionalGeneration
from typer.testing import CliRunner, Result

from miaotui.cli.app import app
from miaotui.media.features import load_extractor
from tests.e2e.test_up import Up
from tests.media.checkpoints import (
    make_captioner,
    make_captioner_tokenizer,
    make_whisper,
    make_whisper_tokenizer,
)

RATE = 16_000
# What logits of tokens and of the second best must differ by: far more than rounding changes.
GAP = 0.01
NAMES = {"en": "english", "zh": "chinese", "de": "german"}


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})


def _sound(seconds: float, seed: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)
    soundfile.write(file, noise, RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


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
    assert (best.values[:, 0] - best.values[:, 1]).min() > GAP


def _heard(directory: Path, data: bytes, language: str) -> list[str]:
    """The text of each window, as transformers writes it."""
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


def _language(directory: Path, data: bytes) -> str:
    model: Any = WhisperForConditionalGeneration.from_pretrained(directory).eval()
    (token,) = model.detect_language(_inputs(directory, "audio", data)[0]).tolist()
    return NAMES[make_whisper_tokenizer().convert_ids_to_tokens(token).strip("<|>")]


def _seen(directory: Path, data: bytes) -> str:
    model: Any = VisionEncoderDecoderModel.from_pretrained(directory).eval()
    (pixels,) = _inputs(directory, "image", data)
    (ids,) = model.generate(pixels, max_new_tokens=20, do_sample=False, num_beams=1)
    _check_decisive(model, pixels, ids[:1].tolist(), ids[1:].tolist())
    return str(make_captioner_tokenizer().decode(ids, skip_special_tokens=True))


@pytest.mark.timeout(600)
def test_texts_are_those_of_transformers(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whisper = make_whisper(tmp_path / "whisper")
    captioner = make_captioner(tmp_path / "captioner")
    arguments = (
        *("--transcriber", str(whisper), "--transcriber-stages", "2"),
        *("--captioner", str(captioner), "--captioner-stages", "1"),
        *("--dtype", "float32", "--ready-timeout", "400"),
    )
    up = Up(Path("none"), tmp_path / "log", *arguments)
    up.start()
    try:
        up.wait_for("Ctrl-C stops everything", 400)
        _check_sound(up.url, whisper, tmp_path)
        _check_pictures(up.url, captioner, tmp_path)
        told = _run("models", "--url", up.url).stdout
        assert "writes down what is said" in told
        assert "describes pictures" in told
        up.ask_to_stop()
        assert up.wait(120) == 0
    finally:
        up.stop()
    up.assert_nothing_left()


def _check_sound(url: str, whisper: Path, directory: Path) -> None:
    sound = _sound(3.1, 1)
    expected = _heard(whisper, sound, "de")
    assert len(expected) == 2
    assert all(expected)
    assert len(set(expected)) == 2, "the texts must depend on the sound"
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        told: Any = client.audio.transcriptions.create(
            file=("sound.flac", sound),
            model="whisper",
            language="de",
            response_format="verbose_json",
        )
        assert [segment.text for segment in told.segments] == expected
        assert told.duration == pytest.approx(3.1, abs=0.001)
        assert told.language == "german"
        guessed: Any = client.audio.transcriptions.create(
            file=("sound.flac", sound), model="whisper", response_format="verbose_json"
        )
        assert guessed.language == _language(whisper, sound)
    file = directory / "sound.flac"
    file.write_bytes(sound)
    done = _run("transcribe", str(file), "--language", "de", "--format", "srt", "--url", url)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("1\n00:00:00,000 --> 00:00:0")
    assert [text for text in expected if text in done.stdout] == expected
    wrong = _run("transcribe", str(file), "--language", "xx", "--url", url)
    assert wrong.exit_code == 1
    assert "must be one of de, en, zh" in wrong.stderr


def _check_pictures(url: str, captioner: Path, directory: Path) -> None:
    captions = []
    for seed in (1, 3):
        picture = _picture(seed)
        expected = _seen(captioner, picture)
        captions.append(expected)
        data = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        part = {"type": "image_url", "image_url": {"url": data}}
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            messages: Any = [{"role": "user", "content": [part]}]
            told = client.chat.completions.create(model="captioner", messages=messages)
        assert told.choices[0].message.content == expected
        file = directory / f"{seed}.png"
        file.write_bytes(picture)
        done = _run("describe", str(file), "--url", url)
        assert done.exit_code == 0, done.output
        assert done.stdout == expected + "\n"
    assert captions[0] != captions[1], "the texts must depend on the picture"
