"""The paged cache of keys and values that a decoder stage holds (Kwon et al., 2023,
arXiv:2309.06180).

The cache is divided into blocks of a few tokens. The head gives blocks to sequences and sends
each sequence's table of blocks along, so that a block may belong to several sequences that
begin alike, and all stages agree on who holds what.
"""

from __future__ import annotations

import logging

import psutil
import torch

from miaotui.models.errors import ModelError
from miaotui.models.shape import ModelShape

log = logging.getLogger(__name__)

# Share of the memory that is available once the weights are there, and a bound on it for CPUs,
# whose memory is others' too.
_CPU_SHARE, _CPU_LIMIT = 0.25, 4 << 30
_CUDA_SHARE = 0.85
# A cache for less than a context of this length (or the model's, if that is shorter) is refused.
_LEAST_CONTEXT = 4096


class KVCache:
    """Keys and values of a stage's layers, each [blocks * block_tokens, kv_heads, head_dim].

    Slot `block * block_tokens + offset` holds a token. Memory on a CPU is taken as it is first
    written to.
    """

    def __init__(
        self,
        shape: ModelShape,
        layers: int,
        blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        size = (blocks * block_tokens, shape.kv_heads, shape.head_dim)
        # Not zeroed, which would take all of the memory at once: no slot is read before it
        # has been written to.
        self.keys = [torch.empty(size, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(size, dtype=dtype, device=device) for _ in range(layers)]


def count_blocks(
    shape: ModelShape,
    layers: int,
    block_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_cache_bytes: int | None,
    sharers: int = 1,
) -> int:
    """Return how many blocks fit into `kv_cache_bytes`.

    Args:
        shape: the model's dimensions.
        layers: the stage's layers.
        block_tokens: tokens a block.
        dtype: element type of keys and values.
        device: where they lie.
        kv_cache_bytes: None: on CUDA most of what is free, on a CPU a quarter of what is
            available, at most 4 GiB; in either case no more than 64 contexts of full length.
        sharers: stages that share this machine's memory, this one included; a CPU's budget is
            divided among them.

    Raises:
        ModelError: not even one context of usable length fits.
    """
    token_bytes = 2 * shape.kv_heads * shape.head_dim * dtype.itemsize * layers
    block_bytes = token_bytes * block_tokens
    context = -(-shape.max_sequence_length // block_tokens)
    given = kv_cache_bytes is not None
    budget = kv_cache_bytes if kv_cache_bytes is not None else _available(device, sharers)
    blocks = budget // block_bytes
    if not given:
        blocks = min(blocks, 64 * context)
    least = -(-min(shape.max_sequence_length, _LEAST_CONTEXT) // block_tokens)
    if blocks < least:
        raise ModelError(
            f"{budget} bytes of KV cache hold {blocks * block_tokens} tokens of this stage's "
            f"{layers} layers; give it at least {least * block_bytes} bytes "
            f"({least * block_tokens} tokens), better {context * block_bytes} (a full context)"
        )
    if blocks < context:
        log.warning(
            "the KV cache holds %d tokens, less than the model's context of %d; longer texts "
            "will be refused (a full context takes %d bytes)",
            blocks * block_tokens,
            shape.max_sequence_length,
            context * block_bytes,
        )
    return int(blocks)


def _available(device: torch.device, sharers: int) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _CUDA_SHARE)
    budget = min(int(psutil.virtual_memory().available * _CPU_SHARE), _CPU_LIMIT)
    return budget // sharers
