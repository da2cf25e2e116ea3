"""The model families that Miaotui can split, and how each splits into stages.

A family builds a stage's *skeleton*: transformers' own module tree on the meta device (no
memory) with everything that the stage does not hold cut away. The skeleton's state dict then
names exactly the tensors to read from the checkpoint, by transformers' own names.

Families of encoders are here, those of decoders in `decoder_families`, those of both together
in `seq2seq_families`; a further kind is another class with the `Family` protocol's members and
an entry in the registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForQuestionAnswering

from miaotui.models.attention import PACKED_ATTENTION
from miaotui.models.checkpoint import Checkpoint
from miaotui.models.compressed import BLOCK, apply_compression
from miaotui.models.decoder_families import DECODERS
from miaotui.models.decomposed import decomposed_layers
from miaotui.models.embedding import BertEmbedding, Embedding
from miaotui.models.errors import CheckpointError, UnsupportedModelError
from miaotui.models.layers import LayerRange
from miaotui.models.seq2seq_families import SEQ2SEQ
from miaotui.models.shape import ModelKind, ModelShape, Task

_HEAD = "qa_outputs"


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A stage's modules. `root`'s state dict names the tensors to load into them.

    `embedding` maps (input_ids, token_type_ids, packed), the first two int64 [tokens], to
    [tokens, hidden_size]; it and `embeddings` (its modules) are there on the first stage only,
    `head` ([tokens, hidden_size] to [tokens, 2], or `MeanPooling`) on the last only.
    """

    root: nn.Module
    embeddings: tuple[nn.Module, ...]
    embedding: Embedding | None
    layers: tuple[nn.Module, ...]
    head: nn.Module | None

    @property
    def float32(self) -> nn.Module | None:
        """The module that is held in float32 whatever the compute dtype."""
        return self.head


class StageSkeleton(Protocol):
    """What planning needs of a stage's modules, whatever the kind of the family."""

    @property
    def root(self) -> nn.Module:
        """All of the stage's modules."""
        ...

    @property
    def float32(self) -> nn.Module | None:
        """The module that is held in float32 whatever the compute dtype."""
        ...


class Family(Protocol):
    """How one of transformers' model types splits into stages."""

    @property
    def model_type(self) -> str:
        """Transformers' `model_type`."""
        ...

    @property
    def kind(self) -> ModelKind:
        """Whether its models find answers in a text or write on."""
        ...

    def shape(self, config: Any) -> ModelShape:
        """Return the model's dimensions; raises `UnsupportedModelError`."""
        ...

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint without the family's head; raises `UnsupportedModelError`."""
        ...

    def skeleton(self, config: Any, layers: LayerRange) -> StageSkeleton:
        """Return the modules of the stage that holds `layers`, on the meta device."""
        ...


@dataclass(frozen=True, slots=True)
class ExtractiveFamily:
    """An encoder with a span head, from the BERT lineage.

    Attributes:
        model_type: transformers' `model_type`.
        base: attribute of the base model in the question-answering class.
        stack: attribute path of the layer list below the base model.
        padded_positions: whether position ids start past the padding id and skip padding
            tokens (fairseq's convention: RoBERTa, XLM-RoBERTa).
        token_types: whether the embeddings add token types.
        projection: attribute of a projection after the embeddings, where there is one.
        kind: "extractive", or "embedding": the mean over a sequence's tokens in place of the head.
    """

    model_type: str
    base: str
    stack: str = "encoder"
    padded_positions: bool = False
    token_types: bool = True
    projection: str | None = None
    kind: ModelKind = "extractive"

    def shape(self, config: Any) -> ModelShape:
        """Return the model's dimensions.

        Raises:
            UnsupportedModelError: the configuration asks for something that the packed
                computation does not do.
        """
        self._check_config(config)
        offset = config.pad_token_id + 1 if self.padded_positions else 0
        # DistilBERT's own attribute names are mapped to these by transformers, this one is not.
        intermediate = getattr(config, "hidden_dim", None) or config.intermediate_size
        layers = config.num_hidden_layers
        types = config.type_vocab_size if self.token_types else 0
        return ModelShape(
            model_type=self.model_type,
            layers=layers,
            hidden_size=config.hidden_size,
            intermediate_size=intermediate,
            heads=config.num_attention_heads,
            vocab_size=config.vocab_size,
            type_vocab_size=types,
            max_sequence_length=config.max_position_embeddings - offset,
            kind=self.kind,
            decomposed_layers=decomposed_layers(config, layers=layers, token_types=types),
        )

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint without a question-answering head.

        Raises:
            UnsupportedModelError: there is no head; the message names what is there instead.
        """
        if self.kind == "embedding" or f"{_HEAD}.weight" in checkpoint.tensors:
            return
        heads = sorted(
            {
                name.split(".")[0]
                for name in checkpoint.tensors
                if not name.startswith((f"{self.base}.", "embeddings.", f"{self.stack}."))
            }
        )
        found = f"it holds {', '.join(heads)} instead" if heads else "it holds the base model only"
        raise UnsupportedModelError(
            f"{checkpoint.directory}: this {self.model_type} checkpoint has no question-answering "
            f"head ({_HEAD}.weight); {found}. Use a checkpoint that was fine-tuned for extractive "
            "question answering, or serve its vectors of texts with MIAOTUI_SHARD_TASK=embed"
        )

    def adapted(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint, with a base model's tensors named as in the whole model."""
        if self.kind != "embedding" or f"{_HEAD}.weight" in checkpoint.tensors:
            return checkpoint
        prefix = f"{self.base}."
        if any(name.startswith(prefix) for name in checkpoint.tensors):
            return checkpoint
        tensors = {prefix + name: entry for name, entry in checkpoint.tensors.items()}
        return replace(checkpoint, tensors=tensors)

    def skeleton(self, config: Any, layers: LayerRange) -> Skeleton:
        """Return the stage's modules on the meta device, in evaluation mode."""
        shape = self.shape(config)
        with torch.device("meta"):
            root: nn.Module = AutoModelForQuestionAnswering.from_config(
                config, attn_implementation=PACKED_ATTENTION
            ).eval()
        base: Any = root.get_submodule(self.base)
        first, last = layers.first == 0, layers.end == shape.layers
        stack = base.get_submodule(f"{self.stack}.layer")
        assert isinstance(stack, nn.ModuleList)
        for index in range(shape.layers):
            if index not in layers:
                stack[index] = nn.Identity()
        base.pooler = None
        embeddings: list[nn.Module] = []
        embedding: Embedding | None = None
        if first:
            embeddings.append(base.get_submodule("embeddings"))
            project = getattr(base, self.projection, None) if self.projection else None
            if project is not None:
                embeddings.append(project)
            embedding = BertEmbedding(
                embeddings[0],
                project,
                config.pad_token_id,
                padded_positions=self.padded_positions,
                token_types=self.token_types,
            )
        else:
            base.embeddings = None
            if self.projection:
                setattr(base, self.projection, None)
        if self.kind == "embedding":
            setattr(root, _HEAD, MeanPooling() if last else None)
        elif not last:
            setattr(root, _HEAD, None)
        _drop_buffers(root)
        if block := getattr(config, BLOCK, None):
            with torch.device("meta"):
                apply_compression(root, block)
        return Skeleton(
            root=root,
            embeddings=tuple(embeddings),
            embedding=embedding,
            layers=tuple(stack[index] for index in layers),
            head=root.get_submodule(_HEAD) if last else None,
        )

    def _check_config(self, config: Any) -> None:
        problems = []
        if getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
            problems.append(f"position_embedding_type {config.position_embedding_type!r}")
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            problems.append("is_decoder / add_cross_attention")
        if getattr(config, "quantization_config", None):
            problems.append("quantization_config")
        if self.kind == "extractive" and config.num_labels != 2:
            problems.append(f"{config.num_labels} labels (a span head has 2: start and end)")
        if self.padded_positions and config.pad_token_id is None:
            problems.append("no pad_token_id, from which positions are counted")
        if problems:
            raise UnsupportedModelError(
                f"{self.model_type} with {', '.join(problems)} is not supported; "
                "correct config.json if that is wrong, or use another checkpoint"
            )


class MeanPooling(nn.Module):
    """The mean over each sequence's tokens, scaled to length 1 (Sentence-BERT, 2019)."""

    def forward(self, hidden: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Return [sequences, hidden_size] of [tokens, hidden_size]."""
        means = torch.stack([part.mean(0) for part in hidden.split(list(lengths))])
        return nn.functional.normalize(means, dim=1)


_EXTRACTIVE: Sequence[ExtractiveFamily] = (
    ExtractiveFamily("bert", base="bert"),
    ExtractiveFamily("distilbert", base="distilbert", stack="transformer", token_types=False),
    ExtractiveFamily("roberta", base="roberta", padded_positions=True),
    ExtractiveFamily("xlm-roberta", base="roberta", padded_positions=True),
    ExtractiveFamily("electra", base="electra", projection="embeddings_project"),
)

_ALL: list[Family] = [*_EXTRACTIVE, *DECODERS, *SEQ2SEQ]

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ALL}


def find_family(model_type: object, where: object, task: Task = "auto") -> Family:
    """Return the family of a `model_type`; `where` is named in the error.

    `task`: "embed" for vectors of texts; "auto": what the family is for.

    Raises:
        UnsupportedModelError: no such family is supported.
    """
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        kind = f"model_type {model_type!r}" if model_type else "a config.json without model_type"
        raise UnsupportedModelError(
            f"{where}: {kind} is not supported; supported are "
            f"{', '.join(sorted(f.model_type for f in _EXTRACTIVE))} with a question-answering "
            f"head, {', '.join(sorted(f.model_type for f in DECODERS))} with a language-model "
            f"head, and {', '.join(sorted(f.model_type for f in SEQ2SEQ))}"
        )
    if task == "embed":
        if not isinstance(family, ExtractiveFamily):
            raise UnsupportedModelError(
                f"{where}: a {family.model_type} model writes text and cannot be served with "
                "MIAOTUI_SHARD_TASK=embed; use an encoder, such as a BERT one"
            )
        return replace(family, kind="embedding")
    return family


def build_config(checkpoint_config: Mapping[str, Any], where: object) -> Any:
    """Return transformers' configuration object for a parsed `config.json`.

    Never runs code that a checkpoint brings along (`auto_map` is ignored).

    Raises:
        UnsupportedModelError: the family is not supported.
        CheckpointError: values in it are of the wrong type or contradict each other.
    """
    values = {key: value for key, value in checkpoint_config.items() if key != "auto_map"}
    family = find_family(values.pop("model_type", None), where)
    if family.kind == "extractive":
        # Memory-saving chunks change nothing in the result and would have to divide the tokens.
        values["chunk_size_feed_forward"] = 0
    try:
        return AutoConfig.for_model(family.model_type, **values)
    except Exception as error:  # transformers' strict dataclasses raise many kinds
        raise CheckpointError(f"{where}: config.json is not valid: {error}") from error


def _drop_buffers(root: nn.Module) -> None:
    """Remove constant buffers (position ids, all-zero token types): both are always passed."""
    for module in root.modules():
        for name in list(module._buffers):
            if name in module._non_persistent_buffers_set:
                delattr(module, name)
