"""Checkpoints as GGUF: names, order of rows and metadata; with llama.cpp there, its texts, too."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.bench import llamacpp
from tests.bench.decoders import agreement
from tests.bench.gguf_file import converted, gguf_name, interleaved, metadata
from tests.decoder_checkpoints import make_decoder, make_decoder_config


def _config(family: str, **extra: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(
        make_decoder_config(family, **extra).to_json_string(use_diff=False)
    )
    return config


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_tensor_has_a_name_of_its_own(family: str) -> None:
    """Those that llama.cpp looks for, and no two the same."""
    model = AutoModelForCausalLM.from_config(make_decoder_config(family, layers=2))
    names = [gguf_name(name) for name in model.state_dict()]
    layer = {
        *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
        *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
    }
    expected = {f"blk.{number}.{name}.weight" for number in (0, 1) for name in layer}
    expected |= {"token_embd.weight", "output_norm.weight", "output.weight"}
    if family == "qwen2":
        expected |= {f"blk.{number}.attn_{name}.bias" for number in (0, 1) for name in "qkv"}
    assert len(names) == len(set(names))
    assert set(names) == expected


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_norm.weight", "score.weight"])
def test_a_tensor_without_a_name_is_not_left_out(name: str) -> None:
    """A file without it would be of another model."""
    with pytest.raises(KeyError):
        gguf_name(name)


def test_rotating_neighbours_gives_the_scores_that_rotating_halves_gave() -> None:
    """What the other order is for: queries and keys agree at any distance as before."""
    heads, width, tokens = 2, 8, 5
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(tokens, 16, generator=generator)
    weights = [torch.randn(heads * width, 16, generator=generator) for _ in range(2)]
    angles = torch.arange(tokens)[:, None] * 0.3 ** torch.arange(width // 2)

    def apart(rows: torch.Tensor) -> torch.Tensor:
        return (inputs @ rows.T).reshape(tokens, heads, width).transpose(0, 1)

    halves = torch.cat((angles, angles), -1)[None]
    query, key = (apart(rows)[None] for rows in weights)
    query, key = apply_rotary_pos_emb(query, key, halves.cos(), halves.sin())
    turn = torch.polar(torch.ones_like(angles), angles)
    turned = [
        torch.view_as_complex(
            apart(torch.from_numpy(interleaved(rows.numpy(), heads))).unflatten(-1, (-1, 2))
        )
        * turn
        for rows in weights
    ]
    scores = (turned[0] @ turned[1].mH).real
    torch.testing.assert_close(scores, (query @ key.mT)[0])


def test_llamas_queries_and_keys_change_their_order_and_nothing_else_does() -> None:
    """Head by head, of as many heads as there are of each; Qwen2 stays as it is."""
    rows = np.arange(16, dtype=np.float32)
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    layer = "model.layers.7.self_attn"
    name, query = converted(f"{layer}.q_proj.weight", rows[:, None], config)
    assert name == "blk.7.attn_q.weight"
    assert query[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15]
    _, key = converted(f"{layer}.k_proj.bias", rows, config)
    assert key.tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    _, value = converted(f"{layer}.v_proj.weight", rows[:, None], config)
    _, other = converted(f"{layer}.q_proj.weight", rows[:, None], config | {"model_type": "qwen2"})
    assert value[:, 0].tolist() == other[:, 0].tolist() == rows.tolist()


def test_metadata_is_the_configuration_s() -> None:
    """Under the architecture's own keys; ids are all of the tokenizer that there is."""
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    config = _config("llama", layers=3, rope_parameters=rope, rms_norm_eps=1e-5)
    assert metadata(config) == {
        "tokenizer.ggml.model": "none",
        "llama.vocab_size": 640,
        "llama.context_length": 512,
        "llama.embedding_length": 32,
        "llama.block_count": 3,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 500000.0,
    }
    assert metadata(_config("qwen2", heads=2))["qwen2.rope.dimension_count"] == 16


@pytest.mark.parametrize(
    "config",
    [
        _config("mistral"),
        _config("llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        _config("qwen2", use_sliding_window=True),
    ],
    ids=["family", "rope", "window"],
)
def test_what_would_be_computed_otherwise_is_refused(config: dict[str, Any]) -> None:
    """Rather than measured."""
    with pytest.raises(ValueError, match=r"neither|not converted"):
        metadata(config)


def test_llama_cpp_that_is_not_installed_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reason goes into the report."""
    monkeypatch.setattr(llamacpp, "find_spec", lambda name: None if name == "gguf" else name)
    assert llamacpp.why_not() == "not installed: gguf (make bench-llama installs them)"
    monkeypatch.setattr(llamacpp, "find_spec", lambda name: name)
    assert llamacpp.why_not() is None


def test_tokens_agree_until_the_first_other_one() -> None:
    """What is the same again behind it does not count."""
    reference = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert agreement(reference, reference) == 100
    assert agreement([[1, 2, 0, 4], [5, 6, 7, 8]], reference) == 75
    assert agreement([[0, 2, 3, 4], [0, 6, 7, 8]], reference) == 0


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("qwen2", True), ("qwen2", False)]
)
def test_llama_cpp_writes_what_transformers_would(family: str, tied: bool, tmp_path: Path) -> None:
    """Every token of every stream is the likeliest one, but for rounding."""
    if why := llamacpp.why_not():
        pytest.skip(why)
    model = make_decoder(tmp_path / "model", family, tie_word_embeddings=tied, tokenizer=False)
    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    batch = torch.randint(5, 640, (3, 9), generator=torch.Generator().manual_seed(2)).tolist()
    with ExitStack() as stack:
        llama = llamacpp.LlamaCpp(stack, model, "f32")
        llama.tune(batch, 20)
        written, rate = llama.generate(batch, 20)
    assert rate > 0
    with torch.inference_mode():
        whole = torch.tensor(
            [[*prompt, *text] for prompt, text in zip(batch, written, strict=True)]
        )
        logits = reference(whole).logits[:, 8:-1]
    behind = logits.amax(-1) - logits.gather(-1, torch.tensor(written)[..., None])[..., 0]
    assert behind.shape == (3, 20)
    assert behind.max() < 0.02 * logits.std()
