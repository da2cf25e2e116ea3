"""A decoder's checkpoint as a GGUF file, for llama.cpp: the same weights under other names.

Llama and Qwen2 only. Which names, which order and which metadata they get is said without the
`gguf` package, which only writes the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file

Floats = npt.NDArray[np.float32]

FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}
"""Types of the matrices, and GGUF's numbers of them; vectors are float32 in all."""
_WHOLE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """A tensor's name in GGUF, such as `blk.3.attn_q.weight`; `KeyError` for an unknown one."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{_WHOLE[module]}.{kind}"
    number, _, module = module.removeprefix("model.layers.").partition(".")
    return f"blk.{int(number)}.{_OF_LAYER[module]}.{kind}"


def interleaved(rows: Floats, heads: int) -> Floats:
    """Each head's rows as llama.cpp rotates Llama's: neighbours instead of one of each half.

    `rows`: float32 [heads * width, …], a projection's weight or bias; the same shape is returned.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def converted(name: str, tensor: Floats, config: Mapping[str, Any]) -> tuple[str, Floats]:
    """Name and values in GGUF of a checkpoint's tensor; `config`: of its `config.json`.

    Qwen2 keeps its order: there llama.cpp rotates one row of each half, as transformers does.
    """
    if config["model_type"] == "llama":
        if ".q_proj." in name:
            tensor = interleaved(tensor, config["num_attention_heads"])
        elif ".k_proj." in name:
            tensor = interleaved(tensor, config["num_key_value_heads"])
    return gguf_name(name), tensor


def metadata(config: Mapping[str, Any]) -> dict[str, int | float | str]:
    """GGUF's keys for a `config.json`; `ValueError` for what llama.cpp would compute otherwise.

    There is no tokenizer: texts go in and out as ids.
    """
    architecture = config["model_type"]
    if architecture not in ("llama", "qwen2"):
        raise ValueError(f"model_type {architecture!r} is neither llama nor qwen2")
    rope = config.get("rope_parameters") or {}
    if (kind := rope.get("rope_type", "default")) != "default" or config.get("rope_scaling"):
        raise ValueError(f"scaled rotary embeddings ({kind}) are not converted")
    if config.get("use_sliding_window"):
        raise ValueError("sliding windows are not converted")
    heads = config["num_attention_heads"]
    return {
        "tokenizer.ggml.model": "none",
        f"{architecture}.vocab_size": config["vocab_size"],
        f"{architecture}.context_length": config["max_position_embeddings"],
        f"{architecture}.embedding_length": config["hidden_size"],
        f"{architecture}.block_count": config["num_hidden_layers"],
        f"{architecture}.feed_forward_length": config["intermediate_size"],
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": config["num_key_value_heads"],
        f"{architecture}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{architecture}.rope.dimension_count": config.get("head_dim")
        or config["hidden_size"] // heads,
        f"{architecture}.rope.freq_base": float(
            rope.get("rope_theta") or config.get("rope_theta", 10000.0)
        ),
    }


def write_gguf(directory: Path, file: Path, file_type: str) -> None:
    """Write a checkpoint's weights to `file`.

    Args:
        directory: with `config.json` and `*.safetensors`.
        file: written anew.
        file_type: one of `FILE_TYPES`.
    """
    import gguf

    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(file, config["model_type"])
    writer.add_file_type(FILE_TYPES[file_type])
    for key, value in metadata(config).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    matrices = gguf.GGMLQuantizationType[file_type.upper()]
    for part in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(part).items():
            # llama.cpp takes the table for the head where there is none.
            if name == "lm_head.weight" and config["tie_word_embeddings"]:
                continue
            found, values = converted(name, tensor.float().numpy(), config)
            kind = matrices if values.ndim > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(found, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
