"""Tiny encoder-decoder checkpoints with random weights of the real architectures, for tests only.

Whisper, and ViT with GPT-2. Sources are short: a Whisper that listens to 40 frames, pictures of
12 x 16 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    GenerationConfig,
    GPT2Config,
    PreTrainedModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

SEQ2SEQ_FAMILIES: tuple[str, ...] = ("whisper", "vision-encoder-decoder")
VOCABULARY = 120
# What Whisper must never write, and must not begin with.
SUPPRESSED, BEGIN_SUPPRESSED = [7, 30, 31, 32, 90], [2, 11, 12, 13]

SHAPES: dict[str, tuple[int, ...]] = {
    "whisper": (6, 40),
    "vision-encoder-decoder": (3, 12, 16),
}


def make_seq2seq(
    directory: Path | str,
    family: str = "whisper",
    *,
    encoder_layers: int = 2,
    decoder_layers: int = 3,
    encoder_width: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a checkpoint with random weights and return its directory.

    `encoder_width`: of a vision model's encoder; another one than 32, the decoder's, makes it
    project its rows. Same seed, same bytes.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    generation: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model: PreTrainedModel
    if family == "whisper":
        model = WhisperForConditionalGeneration(_whisper(encoder_layers, decoder_layers))
        generation |= {
            "suppress_tokens": SUPPRESSED,
            "begin_suppress_tokens": BEGIN_SUPPRESSED,
        }
    else:
        config = _vision(encoder_layers, decoder_layers, encoder_width)
        model = VisionEncoderDecoderModel(config)
    _randomize(model, seed)
    model.generation_config = GenerationConfig(**generation, decoder_start_token_id=1)
    model.to(dtype).save_pretrained(directory)
    return directory


def random_source(family: str, seed: int) -> NDArray[np.float32]:
    """Made-up features of the family's tiny models."""
    drawn = np.random.default_rng(seed).standard_normal(SHAPES[family])
    return drawn.astype(np.float32)


@lru_cache(maxsize=2)
def reference_model(directory: Path, family: str) -> Any:
    """Transformers' own model in float32."""
    kind: Any = WhisperForConditionalGeneration
    if family != "whisper":
        kind = VisionEncoderDecoderModel
    return kind.from_pretrained(directory, dtype=torch.float32).eval()


def generate_about(
    directory: Path, family: str, seed: int, prompt: Sequence[int], tokens: int
) -> list[int]:
    """What transformers writes about the source of this seed, greedily, until the end token."""
    written = reference_model(directory, family).generate(
        torch.from_numpy(random_source(family, seed))[None],
        decoder_input_ids=torch.tensor([list(prompt)]),
        max_new_tokens=tokens,
        do_sample=False,
    )
    text: list[int] = written[0].tolist()
    # Whisper's own leaves the prompt and the end token out.
    if text[: len(prompt)] == list(prompt):
        text = text[len(prompt) :]
    return text[: text.index(2)] if 2 in text else text


def _whisper(encoder_layers: int, decoder_layers: int) -> WhisperConfig:
    return WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=6,
        d_model=32,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=2,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=48,
        max_source_positions=20,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


def _vision(
    encoder_layers: int, decoder_layers: int, encoder_width: int
) -> VisionEncoderDecoderConfig:
    encoder = ViTConfig(
        hidden_size=encoder_width,
        num_hidden_layers=encoder_layers,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=(12, 16),
        patch_size=4,
    )
    decoder = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=decoder_layers,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        is_decoder=True,
        add_cross_attention=True,
    )
    return VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)


def _randomize(model: torch.nn.Module, seed: int) -> None:
    """Fill the parameters so that attention is not uniform and texts depend on the source."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                centre = float(parameter.float().mean().round()) if "bias" not in name else 0.0
                values = values * 0.1 + centre
            elif not any(table in name for table in ("embed", "wte", "wpe")):
                values *= 2.0 * parameter[0].numel() ** -0.5
            parameter.copy_(values)
