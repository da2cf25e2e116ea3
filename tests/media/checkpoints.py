"""Tiny models that hear or see, with random weights of the real architectures, for tests only.

Complete directories: weights, a byte-level tokenizer (with Whisper's special tokens, for the one
that hears), the extractor's and the generation's configuration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    GenerationConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from tests.decoder_checkpoints import make_decoder_tokenizer

LANGUAGES = ("en", "zh", "de")
SPECIAL = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    *(f"<|{code}|>" for code in LANGUAGES),
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)
WINDOW_SECONDS = 2


def make_whisper_tokenizer(timestamps: int = 20) -> WhisperTokenizer:
    """A token a byte, the special ones, and so many timestamps, which are not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = WhisperTokenizer(vocab={char: i for i, char in enumerate(alphabet)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.add_tokens([f"<|{0.02 * i:.2f}|>" for i in range(timestamps)])
    return tokenizer


def make_whisper(
    directory: Path, *, layers: int = 2, hidden: int = 16, seed: int = 0, multilingual: bool = True
) -> Path:
    """A Whisper with windows of 2 s; returns its directory."""
    tokenizer = make_whisper_tokenizer()
    extractor = WhisperFeatureExtractor(feature_size=20, chunk_length=WINDOW_SECONDS)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=20,
        d_model=hidden,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * hidden,
        decoder_ffn_dim=2 * hidden,
        max_source_positions=50 * WINDOW_SECONDS,
        max_target_positions=64,
        pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|endoftext|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = _randomized(WhisperForConditionalGeneration(config), seed)
    more: dict[str, Any] = {}
    if multilingual:
        more["lang_to_id"] = {f"<|{code}|>": ids[f"<|{code}|>"] for code in LANGUAGES}
        more["task_to_id"] = {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"],
        is_multilingual=multilingual,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        suppress_tokens=[
            *_parts_of_characters(tokenizer),
            ids["<|nospeech|>"],
            # A trained model writes none after <|notimestamps|>, and where two stand side by side
            # transformers' `generate` takes the rest of the window for a window of its own.
            *range(ids["<|notimestamps|>"] + 1, len(tokenizer)),
        ],
        begin_suppress_tokens=[ids["<|endoftext|>"], 7],
        max_length=64,
        return_timestamps=False,
        **more,
    )
    for part in (model, tokenizer, extractor):
        part.save_pretrained(directory)
    return directory


def make_captioner_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of `make_captioner`."""
    tokenizer = make_decoder_tokenizer(64)
    tokenizer.chat_template = None  # its turns' end would end texts
    return tokenizer


def make_captioner(directory: Path, *, layers: int = 2, hidden: int = 16, seed: int = 0) -> Path:
    """A ViT that sees pictures of 16 by 16, and a GPT-2 that tells of them."""
    tokenizer = make_captioner_tokenizer()
    small: dict[str, Any] = {"num_hidden_layers": layers, "num_attention_heads": 2}
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(
            hidden_size=hidden, intermediate_size=2 * hidden, image_size=16, patch_size=8, **small
        ),
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=64,
            n_embd=hidden,
            n_layer=layers,
            n_head=2,
            bos_token_id=1,
            eos_token_id=2,
            add_cross_attention=True,
        ),
    )
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    model = _randomized(VisionEncoderDecoderModel(config), seed)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=1,
        pad_token_id=0,
        eos_token_id=2,
        suppress_tokens=_parts_of_characters(tokenizer),
    )
    for part in (model, tokenizer, ViTImageProcessorPil(size={"height": 16, "width": 16})):
        part.save_pretrained(directory)
    return directory


def _parts_of_characters(tokenizer: Any) -> list[int]:
    """Tokens that are no text by themselves: with them, texts would be U+FFFD for the most part."""
    return [
        token
        for token in range(len(tokenizer))
        if "\ufffd" in tokenizer.decode([token]) or not tokenizer.decode([token]).isprintable()
    ]


def _randomized(model: Any, seed: int) -> Any:
    """Weights with which texts depend on what is heard or seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                values = values * 0.1 + (0.0 if "bias" in name else 1.0)
            elif not any(table in name for table in ("embed", "wte", "wpe")):
                values *= 2.0 * parameter[0].numel() ** -0.5
            parameter.copy_(values)
    return model.eval()
