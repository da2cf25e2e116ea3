"""Fingerprints: which model, and which tokenizer, a directory holds, whatever its name.

A model's fingerprint is a SHA-256 over its configuration and its tensors' names, shapes,
dtypes and bytes. It does not depend on how the tensors are spread over files or where the
directory lies. As reading gigabytes takes seconds, it is kept beside the weights (or in the
user's cache directory where that cannot be written) and trusted as long as the files' names,
sizes and modification times are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from miaotui.models.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    TensorEntry,
    current_name,
    read_config,
    read_header,
    weight_files,
)
from miaotui.models.errors import CheckpointError

CACHE_FILE = ".miaotui-fingerprint.json"
# Part of every fingerprint and cache entry: to be raised when the scheme changes.
_SCHEME = "miaotui-fingerprint-1"
# Small enough to leave no mark on a stage's memory, large enough to run without the GIL.
_CHUNK_BYTES = 256 * 1024
_HASH_THREADS = 4

# Entries of config.json that say how a file was written, not what the model computes.
_INCIDENTAL = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "_attn_implementation"}
)

# All files that tokenisers are published with.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def model_fingerprint(directory: Path | str, *, use_cache: bool = True) -> str:
    """Return the fingerprint of a model directory: 64 hexadecimal digits.

    Args:
        directory: holds `config.json` and safetensors weights.
        use_cache: take a kept fingerprint whose files have not changed, and keep a new one.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    directory = Path(directory)
    config = read_config(directory)
    files = weight_files(directory)
    stamp = _stamp([directory / CONFIG_FILE, directory / INDEX_FILE, *files])
    if use_cache and (kept := _read_cache(directory, stamp)) is not None:
        return kept
    result = _compute(config, files)
    # A file that changed while it was read must not vouch for what was read.
    if use_cache and stamp == _stamp([directory / CONFIG_FILE, directory / INDEX_FILE, *files]):
        _write_cache(directory, stamp, result)
    return result


def tokenizer_fingerprint(directory: Path | str) -> str:
    """Return the fingerprint of a directory's tokenizer files: 64 hexadecimal digits.

    Raises:
        CheckpointError: there are none, or one cannot be read.
    """
    directory = Path(directory)
    digest = hashlib.sha256(f"{_SCHEME}/tokenizer".encode())
    found = False
    for name in TOKENIZER_FILES:
        file = directory / name
        if not file.is_file():
            continue
        found = True
        try:
            content = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error}") from error
        digest.update(_framed(name.encode(), content))
    if not found:
        raise CheckpointError(
            f"{directory}: no tokenizer files (tokenizer.json or vocab.txt, …); copy them from "
            "the model's page"
        )
    return digest.hexdigest()


def _compute(config: Mapping[str, Any], files: Iterable[Path]) -> str:
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        tensors |= {current_name(name): entry for name, entry in read_header(file).items()}
    kept = {key: value for key, value in config.items() if key not in _INCIDENTAL}
    digest = hashlib.sha256(f"{_SCHEME}/model".encode())
    digest.update(_framed(json.dumps(kept, sort_keys=True).encode()))
    # Each tensor has a digest of its own, so that several can be computed at once.
    with ThreadPoolExecutor(_HASH_THREADS, "fingerprint") as pool:
        names = sorted(tensors)
        digests = pool.map(lambda name: _hash_tensor(tensors[name]), names)
        for name, tensor_digest in zip(names, digests, strict=True):
            entry = tensors[name]
            head = json.dumps([name, entry.dtype, entry.shape]).encode()
            digest.update(_framed(head, tensor_digest))
    return digest.hexdigest()


def _hash_tensor(entry: TensorEntry) -> bytes:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(entry.nbytes, 1))))
    try:
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.offset)
            left = entry.nbytes
            while left:
                count = stream.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise CheckpointError(f"{entry.file}: cut short while it was read")
                digest.update(buffer[:count])
                left -= count
    except OSError as error:
        raise CheckpointError(f"{entry.file}: cannot be read: {error}") from error
    return digest.digest()


def _framed(*parts: bytes) -> bytes:
    """Join parts so that no two different lists of parts give the same bytes."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def _stamp(files: Iterable[Path]) -> list[list[Any]]:
    stamp: list[list[Any]] = []
    for file in files:
        if file.is_file():
            status = file.stat()
            stamp.append([file.name, status.st_size, status.st_mtime_ns])
    return stamp


def _cache_files(directory: Path) -> tuple[Path, Path]:
    """Where a fingerprint may be kept: beside the model, and in the user's cache directory."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:32]
    return directory / CACHE_FILE, root / "miaotui" / "fingerprints" / f"{key}.json"


def _read_cache(directory: Path, stamp: list[list[Any]]) -> str | None:
    for file in _cache_files(directory):
        try:
            content = json.loads(file.read_bytes())
            if content["scheme"] == _SCHEME and content["files"] == stamp:
                value = content["fingerprint"]
                if isinstance(value, str) and len(value) == 64:
                    return value
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _write_cache(directory: Path, stamp: list[list[Any]], fingerprint: str) -> None:
    content = json.dumps({"scheme": _SCHEME, "files": stamp, "fingerprint": fingerprint})
    for index, file in enumerate(_cache_files(directory)):
        try:
            if index:
                file.parent.mkdir(parents=True, exist_ok=True)
            _replace(file, content)
        except OSError:
            continue
        return


def _replace(file: Path, content: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(content)
        os.replace(temporary, file)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
