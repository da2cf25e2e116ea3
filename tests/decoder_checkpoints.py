"""Tiny decoder checkpoints with random weights of the real architectures, for tests only.

`make_decoder` writes a complete Hugging Face directory: `config.json`, weights,
`generation_config.json`, and a byte-level BPE tokenizer trained on a few lines of English and
Chinese, with a chat template.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tests.checkpoints import training_texts

DECODER_FAMILIES: tuple[str, ...] = (
    "llama", "qwen2", "qwen3", "mistral", "gpt2", "gemma", "gemma2", "gemma3_text",
)  # fmt: skip

BOS, EOS, PAD, START, END = "<s>", "</s>", "<pad>", "<|start|>", "<|end|>"

# As in ChatML, with a generation prompt.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        training_texts(),
        trainers.BpeTrainer(
            vocab_size=640,
            special_tokens=[PAD, BOS, EOS, START, END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
            ),
        ]
    )
    text: str = tokenizer.to_str()
    return text


def make_decoder_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    """Return a fast byte-level BPE tokenizer; `<s>` begins texts, `</s>` and `<|end|>` end them."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[START, END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def make_decoder_config(
    family: str,
    *,
    layers: int = 4,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    vocab_size: int = 640,
    max_length: int = 512,
    **extra: Any,
) -> PreTrainedConfig:
    """Return the configuration of a small model of a family; `extra` goes to its class.

    Windows are 24 tokens, so that short tests slide them; Gemma's heads are wider than
    hidden / heads, as in the published models.
    """
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        return GPT2Config(
            **ids | {"vocab_size": vocab_size, "n_positions": max_length, "n_embd": hidden}
            | {"n_layer": layers, "n_head": heads} | extra
        )  # fmt: skip
    common: dict[str, Any] = ids | {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_length,
    }
    own: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
        "llama": (LlamaConfig, {}),
        "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
        "qwen3": (Qwen3Config, {"head_dim": 16}),
        "mistral": (MistralConfig, {"sliding_window": 24}),
        "gemma": (GemmaConfig, {"head_dim": 16, "num_key_value_heads": 1}),
        "gemma2": (
            Gemma2Config,
            # The published cap of 50 would hardly show on scores as small as these.
            {
                "head_dim": 16,
                "sliding_window": 24,
                "query_pre_attn_scalar": 4,
                "attn_logit_softcapping": 2.0,
            },
        ),
        "gemma3_text": (
            Gemma3TextConfig,
            {
                "head_dim": 16,
                "sliding_window": 24,
                "query_pre_attn_scalar": 12,
                "layer_types": [
                    "full_attention" if index % 3 == 2 else "sliding_attention"
                    for index in range(layers)
                ],
            },
        ),
    }
    config, values = own[family]
    return config(**common | values | extra)


def make_decoder(
    directory: Path | str,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "50GB",
    tokenizer: bool = True,
    **config: Any,
) -> Path:
    """Write a checkpoint with random weights and return its directory.

    Args:
        directory: where to write; made if it is missing.
        family: one of `DECODER_FAMILIES` (transformers' `model_type`).
        seed: same seed, same bytes.
        dtype: element type of the stored tensors.
        max_shard_size: as in `save_pretrained`; small values give several files and an index.
        tokenizer: whether to write tokenizer files too.
        config: arguments of `make_decoder_config`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    made = make_decoder_config(family, **config)
    model = AutoModelForCausalLM.from_config(made)
    randomize_decoder(model, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=[2, 4], pad_token_id=0, do_sample=False
    )
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    if tokenizer:
        make_decoder_tokenizer(made.max_position_embeddings).save_pretrained(directory)
    return directory


def randomize_decoder(model: torch.nn.Module, seed: int) -> None:
    """Fill a decoder's parameters in place with reproducible random values.

    Scaled so that activations keep their size, attention is not uniform, and greedy texts
    do not fall into a loop at once.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                centre = float(parameter.float().mean().round()) if "bias" not in name else 0.0
                values = values * 0.1 + centre
            elif not any(table in name for table in ("embed", "wte", "wpe")):
                values *= 1.5 * parameter.shape[-1] ** -0.5
            elif "Scaled" in type(model.get_submodule(name.rpartition(".")[0])).__name__:
                values *= 0.4 * parameter.shape[-1] ** -0.5  # Gemma's is scaled up again
            parameter.copy_(values)
