"""Loads a stage of a model of any kind."""

from __future__ import annotations

from pathlib import Path

import torch

from miaotui.models.checkpoint import read_config
from miaotui.models.decoder_stage import DecoderStageModel
from miaotui.models.families import find_family
from miaotui.models.layers import LayerRange
from miaotui.models.seq2seq_families import Seq2SeqFamily
from miaotui.models.seq2seq_stage import Seq2SeqStageModel
from miaotui.models.shape import ModelKind, Task
from miaotui.models.stage import StageModel


def model_kind(directory: Path | str) -> ModelKind:
    """Return whether a directory's model finds answers in a text or writes on.

    Reads `config.json` only.

    Raises:
        CheckpointError: it cannot be read.
        UnsupportedModelError: not a family that can be served.
    """
    directory = Path(directory)
    return find_family(read_config(directory).get("model_type"), directory).kind


def load_stage(
    directory: Path | str,
    layers: LayerRange | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    fingerprint: str | None = None,
    kv_cache_bytes: int | None = None,
    kv_block_tokens: int = 16,
    kv_sharers: int = 1,
    task: Task = "auto",
    passage_cache_bytes: int = 0,
) -> StageModel | DecoderStageModel | Seq2SeqStageModel:
    """Read a stage of the kind that the model's family is.

    Arguments and errors are those of `StageModel.load` and `WritingStage.load`; those about the
    KV cache do not matter for extractive models, and `passage_cache_bytes` matters for them only.
    """
    directory = Path(directory)
    family = find_family(read_config(directory).get("model_type"), directory, task)
    if family.kind != "generative":
        return StageModel.load(
            directory,
            layers,
            dtype=dtype,
            device=device,
            fingerprint=fingerprint,
            task=task,
            passage_cache_bytes=passage_cache_bytes,
        )
    writer: type[DecoderStageModel | Seq2SeqStageModel] = DecoderStageModel
    if isinstance(family, Seq2SeqFamily):
        writer = Seq2SeqStageModel
    return writer.load(
        directory,
        layers,
        dtype=dtype,
        device=device,
        fingerprint=fingerprint,
        kv_cache_bytes=kv_cache_bytes,
        kv_block_tokens=kv_block_tokens,
        kv_sharers=kv_sharers,
    )
