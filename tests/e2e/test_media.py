"""`miaotui up --transcriber --captioner`, as a user runs it, against transformers' own texts."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from typer.testing import CliRunner, Result

from miaotui.cli.app import app
from tests.e2e.test_up import Up
from tests.media.checkpoints import make_captioner, make_whisper
from tests.media.reference import heard, language_of, noise, seen, speckles


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})


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
    sound = noise(3.1, 1)
    expected = heard(whisper, sound, "de")
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
        assert guessed.language == language_of(whisper, sound)
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
        picture = speckles(seed)
        expected = seen(captioner, picture)
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
