"""A model taken apart: all its modules in float32, to be changed, trained and saved again."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from miaotui.compression.errors import CompressionError
from miaotui.models.attention import PackedSequences
from miaotui.models.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    Checkpoint,
)
from miaotui.models.compressed import (
    BLOCK,
    VERSION,
    AnyTable,
    CompressedModule,
    compressed_modules,
    describe_linear,
    describe_table,
    is_quantized,
)
from miaotui.models.decomposed import KEY as DECOMPOSED
from miaotui.models.decomposed import divide
from miaotui.models.errors import UnsupportedModelError
from miaotui.models.families import ExtractiveFamily, Skeleton, build_config, find_family
from miaotui.models.filling import fill_skeleton
from miaotui.models.fingerprint import CACHE_FILE
from miaotui.models.fused import Layer, LayerParts, encoder_layers, layer_parts
from miaotui.models.layers import LayerRange
from miaotui.models.stage import StageBatch
from miaotui.models.stage_info import inspect_model

# Linears of a layer, by the names of `LayerParts`.
LINEARS = ("query", "key", "value", "attention_out", "up", "down")
# Which of them share an input, and so its scale and its statistics.
INPUTS = {
    "query": "query",
    "key": "query",
    "value": "query",
    "attention_out": "attention_out",
    "up": "up",
    "down": "down",
}

_LEFT_BEHIND = frozenset({CONFIG_FILE, INDEX_FILE, CACHE_FILE, "README.md", "results.json"})
_HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}


class Workspace:
    """A whole extractive model on the CPU, unfused, so that gradients pass through it."""

    def __init__(
        self, directory: Path, config: dict[str, Any], skeleton: Skeleton, *, heads: int
    ) -> None:
        """Take loaded modules; use `open` instead."""
        self.directory, self.config, self.skeleton = directory, config, skeleton
        self.heads = heads
        self.model_type: str = config["model_type"]
        block = config.get(BLOCK) or {}
        self.steps: list[str] = list(block.get("steps", []))
        self._float_types: dict[str, torch.dtype] = {}
        self._layer_list = next(
            module
            for module in skeleton.root.modules()
            if isinstance(module, nn.ModuleList) and module[0] is skeleton.layers[0]
        )

    @classmethod
    def open(cls, directory: Path | str) -> Workspace:
        """Load a model.

        Raises:
            CompressionError: it writes text, or its weights are quantised already.
            UnsupportedModelError, CheckpointError: as for `StageModel.load`.
        """
        directory = Path(directory)
        checkpoint = Checkpoint.open(directory)
        family, config, shape = inspect_model(checkpoint)
        if not isinstance(family, ExtractiveFamily):
            raise CompressionError(
                f"{directory}: a {family.model_type} model writes text, and only models that find "
                "answers (BERT, DistilBERT, RoBERTa, XLM-RoBERTa, ELECTRA) can be compressed"
            )
        skeleton = family.skeleton(config, LayerRange(0, shape.layers))
        if is_quantized(skeleton.root):
            done = ", ".join((checkpoint.config.get(BLOCK) or {}).get("steps", []))
            raise CompressionError(
                f"{directory}: its weights are quantised already ({done}); compress the model "
                "that it was made from"
            )
        fill_skeleton(skeleton, checkpoint, torch.float32, torch.device("cpu"))
        made = cls(directory, dict(checkpoint.config), skeleton, heads=shape.heads)
        made._float_types = {
            name: _HALVES[entry.dtype]
            for name, entry in checkpoint.tensors.items()
            if entry.dtype in _HALVES
        }
        return made

    @property
    def layers(self) -> list[nn.Module]:
        """The encoder's layers."""
        return list(self._layer_list)

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return int(self.parts(0).attention_out.out_features) // self.heads

    def parts(self, layer: int) -> LayerParts:
        """The modules of a layer."""
        return layer_parts(self.layers[layer], self.model_type)

    def linears(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Yield (layer, part, module) of all layers' linears."""
        for index in range(len(self.layers)):
            parts = self.parts(index)
            for part in LINEARS:
                yield index, part, getattr(parts, part)

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put a module in another's place."""
        for module in self.skeleton.root.modules():
            for name, child in list(module.named_children()):
                if child is old:
                    setattr(module, name, new)

    def drop_layer(self, index: int) -> None:
        """Take a layer out; those after it move up."""
        del self._layer_list[index]
        if index < self.decomposed:
            self.config[DECOMPOSED] = self.decomposed - 1
        key = "n_layers" if self.model_type == "distilbert" else "num_hidden_layers"
        self.config[key] = len(self._layer_list)

    @property
    def decomposed(self) -> int:
        """So many of the first layers read question and passage apart."""
        return int(self.config.get(DECOMPOSED, 0))

    def decompose(self, layers: int) -> None:
        """Let the first layers read question and passage apart.

        Raises:
            CompressionError: they do already, or the model has too few layers or no token types.
        """
        if self.decomposed:
            raise CompressionError(
                f"{self.directory}: its first {self.decomposed} layers read question and passage "
                "apart already; decompose the model that it was made from"
            )
        changed = {**self.config, DECOMPOSED: layers}
        config = build_config(changed, self.directory)
        try:
            find_family(self.model_type, self.directory).shape(config)
        except UnsupportedModelError as error:
            raise CompressionError(str(error)) from error
        self.config = changed

    def hidden(self, batch: StageBatch, *, skip: int | None = None) -> torch.Tensor:
        """The last layer's output [tokens, hidden_size]; without layer `skip`."""
        assert self.skeleton.embedding is not None
        assert batch.input_ids is not None
        types = batch.token_type_ids
        whole = PackedSequences.of(batch.lengths, torch.device("cpu"))
        apart = whole
        if self.decomposed:
            parts = divide(batch.lengths, types)
            apart = PackedSequences.of([part.tokens for part in parts], whole.device)
        ids = batch.input_ids.long()
        hidden = self.skeleton.embedding(ids, None if types is None else types.long(), apart)
        for index, step in enumerate(self._calls()):
            if index != skip:
                hidden = step(hidden, apart if index < self.decomposed else whole)
        return hidden

    def logits(self, batch: StageBatch, *, skip: int | None = None) -> torch.Tensor:
        """Span logits [tokens, 2], as `StageModel.run` gives; gradients pass."""
        assert self.skeleton.head is not None
        result: torch.Tensor = self.skeleton.head(self.hidden(batch, skip=skip))
        return result

    def save(self, out: Path, steps: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Write a checkpoint directory with the source's tokenizer and licence files.

        Weights that came in half precision, and those made of them, are stored so. The directory
        appears whole or not at all.

        Raises:
            CompressionError: `out` is there already, or cannot be written.
        """
        if out.exists():
            raise CompressionError(f"{out}: is there already; give a new directory")
        config = dict(self.config)
        config[BLOCK] = {
            "version": VERSION,
            "steps": [*self.steps, *steps],
            "settings": dict(settings),
            **self._described(),
        }
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
                made = Path(name) / out.name
                made.mkdir()
                for file in sorted(self.directory.iterdir()):
                    if _is_beside(file):
                        shutil.copy(file, made / file.name)
                (made / CONFIG_FILE).write_text(
                    json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
                )
                save_file(self._tensors(), made / WEIGHTS_FILE, metadata={"format": "pt"})
                made.rename(out)
        except OSError as error:
            raise CompressionError(f"{out}: cannot be written: {error}") from error

    def _tensors(self) -> dict[str, torch.Tensor]:
        root = self.skeleton.root
        half = next(iter(set(self._float_types.values())), torch.float32)
        codes = {
            f"{prefix}.{name}"
            for prefix, module in compressed_modules(root)
            for name, _ in module.named_buffers(recurse=False)
        }
        return {
            name: (tensor if name in codes else tensor.to(self._float_types.get(name, half)))
            .detach()
            .contiguous()
            for name, tensor in root.state_dict().items()
        }

    def _described(self) -> dict[str, Any]:
        """What of the modules `config.json`'s own entries do not say."""
        names = {module: name for name, module in self.skeleton.root.named_modules()}
        first = self.parts(0)
        hidden = first.attention_out.out_features
        inner = self.config.get("hidden_dim") or self.config.get("intermediate_size")
        usual = {"up": (hidden, inner), "down": (inner, hidden)}
        linears: dict[str, Any] = {}
        for _, part, module in self.linears():
            shape = (module.in_features, module.out_features)
            plain = not isinstance(module, CompressedModule)
            if not plain or shape != usual.get(part, (hidden, hidden)):
                linears[names[module]] = describe_linear(module)
        tables = {
            name: describe_table(module)
            for name, module in compressed_modules(self.skeleton.root)
            if isinstance(module, AnyTable)
        }
        return {"linears": linears, "embeddings": tables}

    def _calls(self) -> list[Layer]:
        return encoder_layers(self.layers, self.model_type, self.heads, fuse=False)


def _is_beside(file: Path) -> bool:
    """Whether a file of a model directory goes along with changed weights."""
    hidden = file.name.startswith(".") or file.name in _LEFT_BEHIND
    weights = file.suffix in {".safetensors", ".bin", ".pt", ".h5", ".onnx", ".msgpack"}
    return file.is_file() and not hidden and not weights
