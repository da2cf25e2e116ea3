"""Fingerprints follow the content, and only the content."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from miaotui.models import fingerprint as module
from miaotui.models.errors import CheckpointError
from miaotui.models.fingerprint import CACHE_FILE, model_fingerprint, tokenizer_fingerprint
from miaotui.models.stage import StageModel
from tests.checkpoints import make_checkpoint

WEIGHTS = "model.safetensors"


def flip_last_byte(file: Path) -> None:
    """Change one byte, and neither size nor modification time."""
    status = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_one_byte_of_a_tensor_or_the_configuration_changes_it(bert: Path) -> None:
    before = model_fingerprint(bert, use_cache=False)
    assert len(before) == 64
    flip_last_byte(bert / WEIGHTS)
    changed = model_fingerprint(bert, use_cache=False)
    assert changed != before
    flip_last_byte(bert / WEIGHTS)
    assert model_fingerprint(bert, use_cache=False) == before
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-6}))
    assert model_fingerprint(bert, use_cache=False) != before


def test_name_place_files_and_incidentals_do_not_matter(bert: Path, tmp_path: Path) -> None:
    before = model_fingerprint(bert, use_cache=False)
    copy = tmp_path / "elsewhere"
    shutil.copytree(bert, copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {"transformers_version": "0", "_name_or_path": "x", "dtype": "float32"}
    (copy / "config.json").write_text(json.dumps(config, indent=8))
    assert model_fingerprint(copy) == before
    one = make_checkpoint(tmp_path / "one", "bert", layers=2)
    many = make_checkpoint(tmp_path / "many", "bert", layers=2, max_shard_size=30_000)
    assert len(list(many.glob("*.safetensors"))) > 1
    assert model_fingerprint(many) == model_fingerprint(one)


def test_renamed_tensors_change_it(bert: Path) -> None:
    before = model_fingerprint(bert, use_cache=False)
    tensors = load_file(bert / WEIGHTS)
    tensors["qa_outputs.weight2"] = tensors.pop("qa_outputs.weight")
    save_file(tensors, bert / WEIGHTS)
    assert model_fingerprint(bert, use_cache=False) != before


def test_kept_until_a_file_changes(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = model_fingerprint(bert)
    assert (bert / CACHE_FILE).is_file()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_hash_tensor", None)  # nothing is read again
        assert model_fingerprint(bert) == before
        assert StageModel.load(bert, device="cpu").info.fingerprint == before
    os.utime(bert / WEIGHTS)
    flip_last_byte(bert / WEIGHTS)
    assert model_fingerprint(bert) != before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"scheme": "x"}', "\0"])
def test_a_damaged_cache_is_ignored(bert: Path, content: str) -> None:
    before = model_fingerprint(bert)
    (bert / CACHE_FILE).write_text(content)
    assert model_fingerprint(bert) == before
    assert json.loads((bert / CACHE_FILE).read_text())["fingerprint"] == before


def test_read_only_directory_uses_the_users_cache(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write = module._replace

    def refuse(file: Path, content: str) -> None:
        if file.parent == bert:
            raise PermissionError(file)
        write(file, content)

    monkeypatch.setattr(module, "_replace", refuse)
    before = model_fingerprint(bert)
    assert not (bert / CACHE_FILE).exists()
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
    monkeypatch.setattr(module, "_hash_tensor", None)
    assert model_fingerprint(bert) == before


def test_tokenizer_has_its_own(bert: Path) -> None:
    model, tokenizer = model_fingerprint(bert), tokenizer_fingerprint(bert)
    assert tokenizer != model
    flip_last_byte(bert / "tokenizer.json")
    assert tokenizer_fingerprint(bert) != tokenizer
    assert model_fingerprint(bert) == model
    for file in bert.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer files"):
        tokenizer_fingerprint(bert)
