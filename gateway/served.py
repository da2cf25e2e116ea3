"""What a tokenizer and the shards behind it serve together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from miaotui.media.languages import Language
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb

Role: TypeAlias = Literal["extractive", "generative", "embedding", "transcribing", "captioning"]
WRITING_ROLES: frozenset[Role] = frozenset(("generative", "transcribing", "captioning"))
"""Of models that write text: after a prompt, or about sound or a picture."""

_MODALITIES: dict[Role, shard_pb.InputModality.ValueType] = {
    "transcribing": shard_pb.INPUT_MODALITY_AUDIO,
    "captioning": shard_pb.INPUT_MODALITY_IMAGE,
}
_DOES = {
    shard_pb.MODEL_KIND_EXTRACTIVE: "finds spans",
    shard_pb.MODEL_KIND_GENERATIVE: "writes text",
    shard_pb.MODEL_KIND_EMBEDDING: "turns texts into vectors",
}

_TAKES = {
    shard_pb.INPUT_MODALITY_UNSPECIFIED: "reads text",
    shard_pb.INPUT_MODALITY_AUDIO: "hears sound",
    shard_pb.INPUT_MODALITY_IMAGE: "sees pictures",
}


@dataclass(frozen=True, slots=True)
class Media:
    """What is to be known of a model that hears or sees."""

    max_file_bytes: int
    advised_tokens: int
    """Most tokens of a text that the makers advise."""
    languages: tuple[Language, ...] = ()
    """Empty: English only."""


@dataclass(frozen=True, slots=True)
class Writing:
    """What is to be known of a decoder beside what is known of every model."""

    vocab_size: int
    has_chat_template: bool
    stop_token_ids: tuple[int, ...]
    defaults: tuple[tuple[str, float], ...]
    """Sampling parameters that the model's makers advise, by name."""
    media: Media | None = None
    """Of a model that hears or sees."""


@dataclass(frozen=True, slots=True)
class Served:
    """The model that tokenizer and shards agree on.

    `max_length` in tokens: the longest window; a decoder's prompt and text together.
    `no_answer_thresholds`: by language, where the model was calibrated.
    """

    name: str
    fingerprint: str
    tokenizer_fingerprint: str
    model_type: str
    stages: int
    layers: int
    max_length: int
    writing: Writing | None = None
    no_answer_thresholds: tuple[tuple[str, float], ...] = ()
    script_pieces: tuple[tuple[str, int], ...] = ()
    """By script, pieces of the vocabulary; empty: not told."""

    @property
    def identity(self) -> str:
        """What cached results depend on."""
        return f"{self.fingerprint} {self.tokenizer_fingerprint}"


def agreed(
    kind: shard_pb.ModelKind.ValueType,
    role: Role,
    tokenizer: tokenizer_pb.TokenizerServiceDescribeResponse,
    shard: shard_pb.ShardServiceDescribeResponse,
) -> tuple[Served | None, str]:
    """What a tokenizer and a stage 0 serve together; or None, and why they do not fit.

    `kind` and `role`: what the model is called for.
    """
    stage = shard.stage
    if stage.index != 0:
        return None, f"The shard address leads to stage {stage.index}; it must lead to stage 0."
    if shard.status != shard_pb.STAGE_STATUS_SERVING:
        return None, f"stage 0 does not serve: {shard.reason or 'it gives no reason'}"
    if tokenizer.model_fingerprint != stage.model_fingerprint:
        return None, (
            "The tokenizer serves another model than the shards (their fingerprints differ); "
            "start both with the same model directory."
        )
    for name, told in (("tokenizer", tokenizer.kind), ("stage 0", stage.kind)):
        if told not in (kind, shard_pb.MODEL_KIND_UNSPECIFIED):
            return None, (
                f"{name} serves a model that {_DOES.get(told, 'does something unknown')}, and one "
                f"that {_DOES[kind]} is called for; check which addresses are set for which model."
            )
    modality = _MODALITIES.get(role, shard_pb.INPUT_MODALITY_UNSPECIFIED)
    for name, heard in (
        ("tokenizer", tokenizer.media.modality),
        ("stage 0", stage.input_modality),
    ):
        if heard != modality:
            return None, (
                f"{name} serves a model that {_TAKES.get(heard, 'takes something unknown')}, and "
                f"one that {_TAKES[modality]} is called for; check which addresses are set for "
                "which model."
            )
    decoder = kind == shard_pb.MODEL_KIND_GENERATIVE
    longest = tokenizer.context_length if decoder else tokenizer.max_length
    lengths = [length for length in (longest, stage.max_sequence_length) if length]
    return Served(
        name=stage.model_name,
        fingerprint=stage.model_fingerprint,
        tokenizer_fingerprint=tokenizer.tokenizer_fingerprint,
        model_type=stage.model_type,
        stages=stage.stages,
        layers=stage.model_layers,
        max_length=min(lengths, default=0),
        writing=_writing(tokenizer, stage) if decoder else None,
        no_answer_thresholds=tuple(sorted(tokenizer.no_answer_thresholds.items())),
        script_pieces=tuple(sorted(tokenizer.scripts.items())),
    ), ""


def _writing(
    tokenizer: tokenizer_pb.TokenizerServiceDescribeResponse, stage: shard_pb.StageInfo
) -> Writing:
    return Writing(
        vocab_size=stage.vocab_size or tokenizer.vocab_size,
        has_chat_template=tokenizer.has_chat_template,
        stop_token_ids=tuple(tokenizer.stop_token_ids),
        defaults=tuple((field.name, value) for field, value in tokenizer.sampling.ListFields()),
        media=_media(tokenizer.media) if tokenizer.HasField("media") else None,
    )


def _media(told: tokenizer_pb.MediaInput) -> Media:
    languages = tuple(Language(one.code, one.name, one.token_id) for one in told.languages)
    return Media(int(told.max_file_bytes), told.advised_tokens, languages)
