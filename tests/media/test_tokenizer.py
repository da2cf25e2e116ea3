"""What a decoder begins with, against transformers' own tokenizer of Whisper."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miaotui.media.errors import MediaError
from miaotui.media.features import MediaLimits
from miaotui.media.tokenizer import MediaTokenizer, load_media_tokenizer
from miaotui.text.errors import ModelDirectoryError
from tests.decoder_checkpoints import make_decoder
from tests.media.checkpoints import LANGUAGES, make_captioner, make_whisper, make_whisper_tokenizer


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whisper(tmp_path_factory.mktemp("whisper"), layers=1)


@pytest.fixture(scope="module")
def tokenizer(whisper: Path) -> MediaTokenizer:
    return load_media_tokenizer(whisper, limits=MediaLimits(max_bytes=1000))


def test_speech_begins_as_in_transformers(tokenizer: MediaTokenizer) -> None:
    reference = make_whisper_tokenizer()

    def expected(*names: str) -> list[int]:
        return [int(reference.convert_tokens_to_ids(f"<|{name}|>")) for name in names]

    german = tokenizer.begin(language="de").tolist()
    assert german == expected("startoftranscript", "de", "transcribe", "notimestamps")
    translated = tokenizer.begin(language="zh", translate=True).tolist()
    assert translated == expected("startoftranscript", "zh", "translate", "notimestamps")
    assert tokenizer.begin(detect=True).tolist() == expected("startoftranscript")
    prompt = "  Names: 长江, <|zh|>"
    # What looks like a special token stays text, which transformers refuses altogether.
    plain = reference.get_prompt_ids(prompt.replace("<|zh|>", "")).tolist()
    begun = tokenizer.begin(language="en", previous=prompt).tolist()
    assert begun[: len(plain)] == plain
    assert expected("zh")[0] not in begun
    assert begun[-4:] == tokenizer.begin(language="en").tolist()
    long = tokenizer.begin(language="en", previous="x" * 1000)
    assert len(long) == 1 + (tokenizer.context_length // 2 - 1) + 4


def test_what_is_told_of_speech(tokenizer: MediaTokenizer) -> None:
    assert [one.code for one in tokenizer.languages] == ["en", "zh", "de"]
    assert set(LANGUAGES) == {one.code for one in tokenizer.languages}
    assert tokenizer.languages[1].name == "chinese"
    assert tokenizer.context_length == 64
    assert tokenizer.extractor.limits.max_bytes == 1000
    reference = make_whisper_tokenizer()
    assert tokenizer.stop_token_ids == [reference.convert_tokens_to_ids("<|endoftext|>")]


def test_timestamps_have_no_text(tokenizer: MediaTokenizer) -> None:
    reference = make_whisper_tokenizer()
    hello = reference("Hello", add_special_tokens=False)["input_ids"]
    stamp = reference.convert_tokens_to_ids("<|0.04|>")
    ids = [stamp, *hello, stamp]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hello"
    assert reference.decode(ids, skip_special_tokens=True) == "Hello"


def test_languages_that_the_model_lacks_are_refused(tokenizer: MediaTokenizer) -> None:
    with pytest.raises(MediaError, match="none that this model knows; it knows de, en, zh"):
        tokenizer.begin(language="fr")
    with pytest.raises(MediaError, match="is missing"):
        tokenizer.begin()


def test_english_only(tmp_path: Path) -> None:
    english = load_media_tokenizer(make_whisper(tmp_path, layers=1, multilingual=False))
    assert english.languages == ()
    start, last = english.begin(language="en").tolist()
    assert english.backend.id_to_token(start) == "<|startoftranscript|>"
    assert english.backend.id_to_token(last) == "<|notimestamps|>"
    for wrong in ({"language": "zh"}, {"translate": True}, {"detect": True}):
        with pytest.raises(MediaError, match=r"English only|one language only"):
            english.begin(**wrong)


def test_captions(tmp_path: Path) -> None:
    captioner = load_media_tokenizer(make_captioner(tmp_path, layers=1))
    assert captioner.begin().tolist() == [1]
    assert captioner.stop_token_ids == [2]
    assert captioner.advised_tokens == 20
    with pytest.raises(MediaError, match="no language"):
        captioner.begin(language="en")


def test_directories_that_do_not_fit(whisper: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match="neither hears nor sees"):
        load_media_tokenizer(make_decoder(tmp_path / "decoder", "gpt2", layers=1))
    for file in whisper.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ModelDirectoryError, match=r"preprocessor_config\.json"):
        load_media_tokenizer(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes(
        (whisper / "preprocessor_config.json").read_bytes()
    )
    for name in ("generation_config.json", "config.json"):
        content = json.loads((tmp_path / name).read_bytes())
        for key in ("decoder_start_token_id", "bos_token_id"):
            content.pop(key, None)
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ModelDirectoryError, match="decoder_start_token_id"):
        load_media_tokenizer(tmp_path)
