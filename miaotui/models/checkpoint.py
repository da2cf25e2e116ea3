"""Reads Hugging Face model directories: configuration, safetensors headers, chosen tensors.

The safetensors format is 8 bytes of little-endian header length, a JSON header that gives
each tensor's dtype, shape and byte range, and the tensors' bytes end to end
(format: the safetensors documentation). Tensors are read with `pread` into memory of
their own rather than mapped: a stage's resident memory is then exactly its share, no first
request pays for page faults, and a file replaced on disk cannot crash a running stage.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miaotui.models.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The safetensors library's own limit on a header.
_MAX_HEADER_BYTES = 100_000_000

# By safetensors' name: PyTorch's, and bytes an element. Names, because fingerprints are read by
# processes that have no other use for PyTorch.
_DTYPES: Mapping[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: its file, element type, shape and byte range in that file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model directory whose configuration and tensor headers have been read and checked.

    `config` is the parsed `config.json`; `tensors` maps each tensor's present-day name to
    its place (`LayerNorm.gamma` and `.beta` of early BERT files appear as `.weight` and
    `.bias`). No tensor has been read yet.
    """

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, directory: Path | str) -> Checkpoint:
        """Read a directory's configuration and headers.

        Raises:
            CheckpointError: a file is missing, unreadable or damaged.
        """
        directory = Path(directory)
        config = read_config(directory)
        tensors: dict[str, TensorEntry] = {}
        for file in weight_files(directory):
            for name, entry in read_header(file).items():
                tensors[current_name(name)] = entry
        _check_index(directory, tensors)
        return cls(directory, config, tensors)

    def read(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Read the named tensors, and no others, converted to `dtype`, onto `device`.

        Args:
            shapes: name and expected shape of each tensor to read.
            dtype: floating-point type to convert to.
            device: where the tensors go.

        Raises:
            CheckpointError: tensors are missing, have another shape, or cannot be read.
            UnsupportedModelError: a tensor is not floating-point (a quantised checkpoint).
        """
        self._check(shapes)
        other = sorted(n for n in shapes if self.tensors[n].dtype not in _FLOATS)
        if other:
            raise UnsupportedModelError(
                f"{self.directory}: tensors are not floating-point ({_some(other)}; "
                f"{self.tensors[other[0]].dtype}); quantised checkpoints are supported only as "
                "`miaotui compress` makes them; use the float32, float16 or bfloat16 one"
            )
        return {n: t.to(device=device, dtype=dtype) for n, t in self._read_stored(shapes)}

    def read_stored(
        self, tensors: Mapping[str, torch.Tensor], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Read the named tensors, and no others, in the types that they are stored in.

        Args:
            tensors: name, and a tensor (a meta one will do) of the expected shape and type.
            device: where the tensors go.

        Raises:
            CheckpointError: tensors are missing, have another shape or type, or cannot be read.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._check(shapes)
        wrong = [
            f"{name} is {self.tensors[name].dtype}, expected {tensor.dtype}"
            for name, tensor in tensors.items()
            if _dtype(self.tensors[name]) is not tensor.dtype
        ]
        if wrong:
            raise CheckpointError(
                f"{self.directory}: {len(wrong)} tensor(s) have another type than config.json "
                f"calls for: {_some(wrong)}. Use the config.json that the weights came with"
            )
        return {n: t.to(device=device) for n, t in self._read_stored(shapes)}

    def _read_stored(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, held in by_file.items():
            with _open(file) as stream:
                for name in sorted(held, key=lambda name: self.tensors[name].offset):
                    yield name, _read_tensor(stream.fileno(), self.tensors[name], name)

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        missing = sorted(set(shapes) - set(self.tensors))
        if missing:
            raise CheckpointError(
                f"{self.directory}: {len(missing)} tensor(s) that config.json calls for are "
                f"missing: {_some(missing)}. The weights and the configuration do not belong "
                "together, or a file is incomplete; download the model again"
            )
        wrong = [
            f"{name} is {list(self.tensors[name].shape)}, expected {list(shape)}"
            for name, shape in shapes.items()
            if self.tensors[name].shape != tuple(shape)
        ]
        if wrong:
            raise CheckpointError(
                f"{self.directory}: {len(wrong)} tensor(s) have another shape than config.json "
                f"calls for: {_some(wrong)}. Use the config.json that the weights came with"
            )


def read_config(directory: Path) -> dict[str, Any]:
    """Return the parsed `config.json` of a model directory.

    Raises:
        CheckpointError: there is no such directory or file, or it is not a JSON object.
    """
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: no such model directory; give the directory that holds "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    file = directory / CONFIG_FILE
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory}: no {CONFIG_FILE}; this is not a Hugging Face model directory"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: holds no JSON object; download the file again")
    return config


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a model directory, in a fixed order.

    Raises:
        CheckpointError: there are none, or the index names files that are not there.
    """
    single = directory / WEIGHTS_FILE
    if single.is_file():
        return [single]
    if (directory / INDEX_FILE).is_file():
        names = sorted(set(_read_index(directory).values()))
        files = [directory / name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{directory}: {INDEX_FILE} names files that are missing: {_some(missing)}; "
                "download them"
            )
        return files
    pickles = sorted(file.name for file in directory.glob("*.bin")) + sorted(
        file.name for file in directory.glob("*.pt")
    )
    if pickles:
        raise CheckpointError(
            f"{directory}: the weights are a pickle ({_some(pickles)}), which can run code when "
            "it is opened, so it is not read. Convert it once where you trust it: python -c "
            '"from transformers import AutoModelForQuestionAnswering as M; '
            "M.from_pretrained('DIR').save_pretrained('NEW_DIR')\""
        )
    raise CheckpointError(
        f"{directory}: no weights ({WEIGHTS_FILE} or {INDEX_FILE}); download the model's "
        "safetensors files into it"
    )


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Return the tensors that a safetensors file lists, checked against the file's size.

    Raises:
        CheckpointError: the file is damaged or cut short.
    """
    size = _size(file)
    with _open(file) as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise _damaged(file, f"its header cannot be {length} bytes long in {size} bytes")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise _damaged(file, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    entries: dict[str, TensorEntry] = {}
    for name, item in header.items():
        entries[name] = _entry(file, name, item, 8 + length)
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            raise _damaged(file, "its tensors overlap or leave gaps")
        end += entry.nbytes
    if end != size:
        raise _damaged(file, f"it is {size} bytes long and should be {end}")
    return entries


def current_name(name: str) -> str:
    """Return a tensor's present-day name (early BERT files say `LayerNorm.gamma`/`beta`)."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def _entry(file: Path, name: str, item: Any, base: int) -> TensorEntry:
    try:
        dtype, shape = item["dtype"], tuple(item["shape"])
        begin, end = item["data_offsets"]
        itemsize = _DTYPES[dtype][1] if dtype in _DTYPES else None
        valid = (
            all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            and begin <= end
            and (itemsize is None or math.prod(shape) * itemsize == end - begin)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"its entry for {name!r} is malformed") from error
    if not valid:
        raise _damaged(file, f"dtype, shape and byte range of {name!r} contradict each other")
    return TensorEntry(file, dtype, shape, base + begin, end - begin)


def _dtype(entry: TensorEntry) -> torch.dtype | None:
    import torch

    known = _DTYPES.get(entry.dtype)
    return None if known is None else getattr(torch, known[0])


def _read_tensor(descriptor: int, entry: TensorEntry, name: str) -> torch.Tensor:
    import torch

    raw = torch.empty(entry.nbytes, dtype=torch.uint8)
    view = raw.numpy().data
    done = 0
    while done < entry.nbytes:
        try:
            count = os.preadv(descriptor, [view[done:]], entry.offset + done)
        except OSError as error:
            raise CheckpointError(f"{entry.file}: cannot read {name!r}: {error}") from error
        if count == 0:
            raise _damaged(entry.file, f"it ends within {name!r}")
        done += count
    return raw.view(getattr(torch, _DTYPES[entry.dtype][0])).reshape(entry.shape)


def _read_index(directory: Path) -> dict[str, str]:
    file = directory / INDEX_FILE
    try:
        mapping = json.loads(file.read_bytes())["weight_map"]
        pairs = {str(name): str(value) for name, value in mapping.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a safetensors index: {error!r}") from error
    for value in pairs.values():
        if Path(value).name != value or not value.endswith(".safetensors"):
            raise CheckpointError(
                f"{file}: names {value!r}, which is not a safetensors file beside the index"
            )
    return pairs


def _check_index(directory: Path, tensors: Mapping[str, TensorEntry]) -> None:
    if (directory / WEIGHTS_FILE).is_file() or not (directory / INDEX_FILE).is_file():
        return
    for name, value in _read_index(directory).items():
        entry = tensors.get(current_name(name))
        if entry is None or entry.file.name != value:
            raise CheckpointError(
                f"{directory}: {INDEX_FILE} places {name!r} in {value}, which does not hold it; "
                "index and files come from different downloads"
            )


def _open(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened: {error}") from error


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened: {error}") from error


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: damaged or incomplete safetensors file: {why}; download it again"
    )


def _some(items: Iterable[str], limit: int = 4) -> str:
    listed = list(items)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
