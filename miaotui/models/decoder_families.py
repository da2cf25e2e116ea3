"""The decoder families, and how each splits into stages.

As for the encoders, a stage's skeleton is transformers' own module tree on the meta device
without what the stage does not hold. The first stage has the embeddings, the last the final
norm and the language-model head. Where the head is tied to the embeddings, a stage that has
only the head reads the embedding table for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from miaotui.models.checkpoint import Checkpoint
from miaotui.models.errors import UnsupportedModelError
from miaotui.models.layers import LayerRange
from miaotui.models.paged_attention import PAGED_ATTENTION
from miaotui.models.shape import ModelKind, ModelShape

_HEAD = "lm_head"

# Kinds of rotary position embedding whose frequencies depend on the length of the sequence:
# keys in the cache would have to be computed again as it grows.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})

Rotation = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _unchanged(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return cos, sin


@dataclass(frozen=True, slots=True)
class DecoderSkeleton:
    """A decoder stage's modules.

    `embedding` and `positions` (a table of learnt positions, where the family has one) are
    there on the first stage only, `norm` and `head` on the last only. `rotary` is not on the
    meta device: it computes its frequencies and loads none. `layer_types` are the layers' kinds
    where rotary frequencies differ by kind, else empty. `rotation` makes of `rotary`'s cosines
    and sines, [1, tokens, head_dim] each, what the layers take.
    """

    root: nn.Module
    embedding: nn.Module | None
    positions: nn.Module | None
    rotary: nn.Module | None
    layers: tuple[nn.Module, ...]
    layer_types: tuple[str, ...]
    norm: nn.Module | None
    head: nn.Module | None
    rotation: Rotation = _unchanged

    @property
    def decoder_layers(self) -> tuple[nn.Module, ...]:
        """The layers that keep keys and values: all."""
        return self.layers

    @property
    def float32(self) -> nn.Module | None:
        """The module that is held in float32 whatever the compute dtype: none."""
        return None


@dataclass(frozen=True, slots=True)
class DecoderFamily:
    """A decoder with a language-model head.

    Attributes:
        model_type: transformers' `model_type`.
        base: attribute of the base model in the causal language model's class.
        stack: attribute of the layer list below the base model.
        embedding: attribute of the token embeddings below the base model.
        positions: attribute of the learnt position table, where there is one.
        norm: attribute of the final norm below the base model.
        gated: whether the feed-forward layer multiplies by a gate.
    """

    model_type: str
    base: str = "model"
    stack: str = "layers"
    embedding: str = "embed_tokens"
    positions: str | None = None
    norm: str = "norm"
    gated: bool = True

    @property
    def kind(self) -> ModelKind:
        """These write on."""
        return "generative"

    def shape(self, config: Any) -> ModelShape:
        """Return the model's dimensions.

        Raises:
            UnsupportedModelError: the configuration asks for something that is not computed.
        """
        self._check_config(config)
        hidden, heads = config.hidden_size, config.num_attention_heads
        inner = getattr(config, "n_inner", None) or getattr(config, "intermediate_size", None)
        return ModelShape(
            model_type=self.model_type,
            layers=config.num_hidden_layers,
            hidden_size=hidden,
            intermediate_size=inner or 4 * hidden,
            heads=heads,
            vocab_size=config.vocab_size,
            type_vocab_size=0,
            max_sequence_length=config.max_position_embeddings,
            kind="generative",
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            gated=self.gated,
            tied=bool(config.tie_word_embeddings),
        )

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint without a language-model head.

        Raises:
            UnsupportedModelError: it holds another head, or none.
        """
        names = checkpoint.config.get("architectures") or []
        if any("CausalLM" in name or "LMHead" in name for name in names):
            return
        if names:
            raise UnsupportedModelError(
                f"{checkpoint.directory}: this {self.model_type} checkpoint is a "
                f"{', '.join(map(str, names))}, which has no language-model head; use one that "
                "was trained to generate text (…ForCausalLM)"
            )

    def skeleton(self, config: Any, layers: LayerRange) -> DecoderSkeleton:
        """Return the stage's modules on the meta device, in evaluation mode."""
        shape = self.shape(config)
        with torch.device("meta"):
            root: nn.Module = AutoModelForCausalLM.from_config(
                config, attn_implementation=PAGED_ATTENTION
            ).eval()
        base: Any = root.get_submodule(self.base)
        first, last = layers.first == 0, layers.end == shape.layers
        stack = getattr(base, self.stack)
        for index in range(shape.layers):
            if index not in layers:
                stack[index] = nn.Identity()
        rotary = getattr(base, "rotary_emb", None)
        if rotary is not None:
            base.rotary_emb = None
            rotary = type(rotary)(config)
        if first:
            _compute_scale(getattr(base, self.embedding))
        else:
            setattr(base, self.embedding, None)
            if self.positions:
                setattr(base, self.positions, None)
        if not last:
            setattr(root, _HEAD, None)
            setattr(base, self.norm, None)
        by_type = rotary is not None and isinstance(getattr(rotary, "rope_type", None), dict)
        return DecoderSkeleton(
            root=root,
            embedding=getattr(base, self.embedding) if first else None,
            positions=getattr(base, self.positions) if first and self.positions else None,
            rotary=rotary,
            layers=tuple(stack[index] for index in layers),
            layer_types=tuple(config.layer_types[i] for i in layers) if by_type else (),
            norm=getattr(base, self.norm) if last else None,
            head=root.get_submodule(_HEAD) if last else None,
        )

    def sources(self, skeleton: DecoderSkeleton, checkpoint: Checkpoint) -> Mapping[str, str]:
        """Return which of the checkpoint's tensors each of the skeleton's parameters is.

        Checkpoints name tensors with or without the base model's prefix. A tied head that the
        checkpoint does not hold is its embedding table, and the other way round; where it
        holds both, each is read, as transformers does.

        Raises:
            UnsupportedModelError: there is no language-model head.
        """
        table, head = f"{self.base}.{self.embedding}.weight", f"{_HEAD}.weight"
        tied = bool(checkpoint.config.get("tie_word_embeddings", self._ties(skeleton)))
        sources = {}
        for name, _ in skeleton.root.named_parameters(remove_duplicate=False):
            sources[name] = self._stored(name, checkpoint)
        if tied and head in sources and sources[head] not in checkpoint.tensors:
            sources[head] = self._stored(table, checkpoint)
        if tied and table in sources and sources[table] not in checkpoint.tensors:
            sources[table] = head
        if head in sources and sources[head] not in checkpoint.tensors:
            raise UnsupportedModelError(
                f"{checkpoint.directory}: this {self.model_type} checkpoint has no language-model "
                f"head ({head}) and its embeddings are not tied to one; it is a base model, use "
                "one that was trained to generate text"
            )
        return sources

    def _ties(self, skeleton: DecoderSkeleton) -> bool:
        return bool(skeleton.root.config.tie_word_embeddings)  # type: ignore[union-attr]

    def _stored(self, name: str, checkpoint: Checkpoint) -> str:
        bare = name.removeprefix(f"{self.base}.")
        return bare if name not in checkpoint.tensors and bare in checkpoint.tensors else name

    def _check_config(self, config: Any) -> None:
        problems = []
        if getattr(config, "quantization_config", None):
            problems.append("quantization_config")
        if getattr(config, "add_cross_attention", False):
            problems.append("add_cross_attention")
        if getattr(config, "use_bidirectional_attention", False):
            problems.append("use_bidirectional_attention")
        for kind in sorted(_rope_types(config)):
            if kind in _LENGTH_DEPENDENT_ROPE:
                problems.append(f"rope_type {kind!r}, which depends on the sequence's length,")
            elif kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
                problems.append(f"rope_type {kind!r}")
        if problems:
            raise UnsupportedModelError(
                f"{self.model_type} with {', '.join(problems)} is not supported; "
                "correct config.json if that is wrong, or use another checkpoint"
            )


def _rope_types(config: Any) -> set[str]:
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return set()
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(item.get("rope_type", "default")) for item in nested or [parameters]}


def _compute_scale(embedding: nn.Module) -> None:
    """Compute the factor on Gemma's embeddings, a constant that no checkpoint holds."""
    scale = getattr(embedding, "scalar_embed_scale", None)
    if scale is not None:
        embedding.embed_scale = torch.tensor(scale)


DECODERS: Sequence[DecoderFamily] = (
    DecoderFamily("llama"),
    DecoderFamily("qwen2"),
    DecoderFamily("qwen3"),
    DecoderFamily("mistral"),
    DecoderFamily("gemma"),
    DecoderFamily("gemma2"),
    DecoderFamily("gemma3_text"),
    DecoderFamily(
        "gpt2",
        base="transformer",
        stack="h",
        embedding="wte",
        positions="wpe",
        norm="ln_f",
        gated=False,
    ),
)
