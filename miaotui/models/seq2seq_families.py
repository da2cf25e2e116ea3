"""Encoder-decoder models that write about a sound or a picture, and how each splits into stages.

Their layers are the encoder's, then the decoder's. The first stage embeds the features; the
stage with the encoder's last layer finishes its rows; the stage with the decoder's first layer
embeds the tokens; the last has the language-model head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import gelu
from transformers import VisionEncoderDecoderModel, WhisperForConditionalGeneration

from miaotui.models.checkpoint import Checkpoint
from miaotui.models.errors import UnsupportedModelError
from miaotui.models.layers import LayerRange
from miaotui.models.seq2seq_skeleton import (
    SEQ2SEQ_ATTENTION,
    PartNames,
    Seq2SeqSkeleton,
    cut_skeleton,
    find_sources,
)
from miaotui.models.shape import ModelKind, ModelShape, SourceShape

_WHISPER = PartNames(
    encoder="model.encoder",
    source_embedding=("conv1", "conv2", "embed_positions"),
    encoder_norm="layer_norm",
    unused=(),
    projection="",
    decoder="model.decoder",
    stack="layers",
    embedding="embed_tokens",
    positions="embed_positions",
    norm="layer_norm",
    head="proj_out",
    cross="encoder_attn",
)

_VISION = PartNames(
    encoder="encoder",
    source_embedding=("embeddings",),
    encoder_norm="layernorm",
    unused=("pooler",),
    projection="enc_to_dec_proj",
    decoder="decoder.transformer",
    stack="h",
    embedding="wte",
    positions="wpe",
    norm="ln_f",
    head="decoder.lm_head",
    cross="crossattention",
)

# ViT's tensors by the names that checkpoints have them under.
_VIT_STORED = (
    (r"^encoder\.layers\.", "encoder.encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


@dataclass(frozen=True, slots=True)
class WhisperFamily:
    """Speech recognition (Radford et al., 2022, arXiv:2212.04356)."""

    model_type: str = "whisper"

    @property
    def kind(self) -> ModelKind:
        """These write."""
        return "generative"

    def shape(self, config: Any) -> ModelShape:
        """Return the model's dimensions."""
        _check_quantization(config)
        width, heads = config.d_model, config.decoder_attention_heads
        return ModelShape(
            model_type=self.model_type,
            layers=config.encoder_layers + config.decoder_layers,
            hidden_size=width,
            intermediate_size=config.decoder_ffn_dim,
            heads=heads,
            vocab_size=config.vocab_size,
            type_vocab_size=0,
            max_sequence_length=config.max_target_positions,
            kind="generative",
            kv_heads=heads,
            head_dim=width // heads,
            tied=bool(config.tie_word_embeddings),
            source=SourceShape(
                modality="audio",
                # The second convolution takes every other frame.
                shape=(config.num_mel_bins, 2 * config.max_source_positions),
                rows=config.max_source_positions,
                layers=config.encoder_layers,
                width=width,
                intermediate_size=config.encoder_ffn_dim,
                memory_width=width,
            ),
        )

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint that does not write.

        Raises:
            UnsupportedModelError: it classifies, or holds the base model.
        """
        _check_architecture(self.model_type, checkpoint, "WhisperForConditionalGeneration")

    def skeleton(self, config: Any, layers: LayerRange) -> Seq2SeqSkeleton:
        """Return the stage's modules on the meta device, in evaluation mode."""
        with torch.device("meta"):
            root: Any = WhisperForConditionalGeneration._from_config(
                config, attn_implementation=SEQ2SEQ_ATTENTION
            ).eval()
        encoder = root.model.encoder

        def embed(features: torch.Tensor) -> torch.Tensor:
            hidden = gelu(encoder.conv2(gelu(encoder.conv1(features)))).transpose(1, 2)
            embedded: torch.Tensor = hidden + encoder.embed_positions.weight
            return embedded

        return cut_skeleton(root, _WHISPER, self.shape(config), layers, embed)

    def sources(self, skeleton: Seq2SeqSkeleton, checkpoint: Checkpoint) -> Mapping[str, str]:
        """Return which of the checkpoint's tensors each of the skeleton's parameters is.

        Raises:
            UnsupportedModelError: there is no language-model head.
        """
        shape = self.shape(skeleton.root.config)
        return find_sources(shape, skeleton, checkpoint, _WHISPER, lambda name: name)


@dataclass(frozen=True, slots=True)
class VisionFamily:
    """A picture's description: ViT as the encoder, GPT-2 as the decoder (Li et al., 2021,
    arXiv:2109.10282, pair transformers so).
    """

    model_type: str = "vision-encoder-decoder"

    @property
    def kind(self) -> ModelKind:
        """These write."""
        return "generative"

    def shape(self, config: Any) -> ModelShape:
        """Return the model's dimensions.

        Raises:
            UnsupportedModelError: another encoder or decoder than those that are supported.
        """
        _check_quantization(config)
        encoder, decoder = config.encoder, config.decoder
        problems = []
        if encoder.model_type != "vit":
            problems.append(f"a {encoder.model_type} encoder (vit is)")
        if decoder.model_type != "gpt2":
            problems.append(f"a {decoder.model_type} decoder (gpt2 is)")
        elif not decoder.add_cross_attention:
            problems.append("a decoder without add_cross_attention")
        elif getattr(decoder, "cross_attention_hidden_size", None):
            problems.append("cross_attention_hidden_size")
        if problems:
            raise UnsupportedModelError(
                f"{self.model_type} with {' and '.join(problems)} is not supported; use another "
                "checkpoint"
            )
        channels, (height, width) = encoder.num_channels, _pair(encoder.image_size)
        patch_height, patch_width = _pair(encoder.patch_size)
        hidden, heads = decoder.hidden_size, decoder.num_attention_heads
        return ModelShape(
            model_type=self.model_type,
            layers=encoder.num_hidden_layers + decoder.num_hidden_layers,
            hidden_size=max(encoder.hidden_size, hidden),
            intermediate_size=decoder.n_inner or 4 * hidden,
            heads=heads,
            vocab_size=decoder.vocab_size,
            type_vocab_size=0,
            max_sequence_length=decoder.max_position_embeddings,
            kind="generative",
            kv_heads=heads,
            head_dim=hidden // heads,
            tied=bool(decoder.tie_word_embeddings),
            source=SourceShape(
                modality="image",
                shape=(channels, height, width),
                # One more stands for the whole picture.
                rows=(height // patch_height) * (width // patch_width) + 1,
                layers=encoder.num_hidden_layers,
                width=encoder.hidden_size,
                intermediate_size=encoder.intermediate_size,
                memory_width=hidden,
            ),
        )

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint of another class.

        Raises:
            UnsupportedModelError: it is one.
        """
        _check_architecture(self.model_type, checkpoint, "VisionEncoderDecoderModel")

    def skeleton(self, config: Any, layers: LayerRange) -> Seq2SeqSkeleton:
        """Return the stage's modules on the meta device, in evaluation mode."""
        with torch.device("meta"):
            root: Any = VisionEncoderDecoderModel._from_config(
                config, attn_implementation=SEQ2SEQ_ATTENTION
            ).eval()
        embeddings = root.encoder.embeddings

        def embed(pixels: torch.Tensor) -> torch.Tensor:
            embedded: torch.Tensor = embeddings(pixels)
            return embedded

        return cut_skeleton(root, _VISION, self.shape(config), layers, embed)

    def sources(self, skeleton: Seq2SeqSkeleton, checkpoint: Checkpoint) -> Mapping[str, str]:
        """Return which of the checkpoint's tensors each of the skeleton's parameters is.

        Raises:
            UnsupportedModelError: there is no language-model head.
        """
        shape = self.shape(skeleton.root.config)
        return find_sources(shape, skeleton, checkpoint, _VISION, _vit_name)


Seq2SeqFamily = WhisperFamily | VisionFamily

SEQ2SEQ: Sequence[Seq2SeqFamily] = (WhisperFamily(), VisionFamily())


def _vit_name(name: str) -> str:
    if name.startswith("encoder.layers."):
        for pattern, old in _VIT_STORED:
            name = re.sub(pattern, old, name)
    return name


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def _check_quantization(config: Any) -> None:
    if getattr(config, "quantization_config", None):
        raise UnsupportedModelError(
            f"{config.model_type} with quantization_config is not supported; use the checkpoint "
            "that it was made of"
        )


def _check_architecture(model_type: str, checkpoint: Checkpoint, wanted: str) -> None:
    names = checkpoint.config.get("architectures") or [wanted]
    if wanted not in names:
        raise UnsupportedModelError(
            f"{checkpoint.directory}: this {model_type} checkpoint is a "
            f"{', '.join(map(str, names))}, which writes no text; use a {wanted}"
        )
