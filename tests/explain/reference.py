"""Attributions and rollout from transformers' own, unsplit model, written down independently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering


def load(directory: Path, attention: str = "eager") -> Any:
    """transformers' model in float32."""
    return AutoModelForQuestionAnswering.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention
    ).eval()


def attribution(
    model: Any,
    ids: torch.Tensor,
    types: torch.Tensor | None,
    replaced: torch.Tensor,
    span: tuple[int, int],
    points: list[float],
    weights: list[float],
) -> tuple[torch.Tensor, float, float]:
    """(attribution by token, logit, logit of the baseline) by a sum over the points."""
    table = model.get_input_embeddings()
    words = table(ids).detach()
    pad = table(torch.tensor([model.config.pad_token_id])).detach()
    baseline = torch.where(replaced[:, None], pad, words)

    def logit(embeddings: torch.Tensor) -> torch.Tensor:
        extra = {} if types is None else {"token_type_ids": types[None]}
        if "roberta" in str(model.config.model_type):
            counted = ids.ne(model.config.pad_token_id).long()
            positions = counted.cumsum(0) * counted + model.config.pad_token_id
            extra["position_ids"] = positions[None]
        mask = torch.ones(1, len(ids), dtype=torch.int64)
        out = model(inputs_embeds=embeddings[None], attention_mask=mask, **extra)
        found: torch.Tensor = out.start_logits[0, span[0]] + out.end_logits[0, span[1]]
        return found

    total = torch.zeros_like(words)
    for point, weight in zip(points, weights, strict=True):
        at = (baseline + point * (words - baseline)).requires_grad_()
        (slope,) = torch.autograd.grad(logit(at), at)
        total += weight * slope
    by_token = (total * (words - baseline)).sum(-1)
    with torch.no_grad():
        return by_token, float(logit(words)), float(logit(baseline))


def attention(model: Any, ids: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
    """Attention weights [layers, heads, tokens, tokens]."""
    extra = {} if types is None else {"token_type_ids": types[None]}
    mask = torch.ones(1, len(ids), dtype=torch.int64)
    with torch.no_grad():
        out = model(input_ids=ids[None], attention_mask=mask, output_attentions=True, **extra)
    return torch.stack([layer[0] for layer in out.attentions])


def rollout(weights: torch.Tensor) -> torch.Tensor:
    """Abnar and Zuidema's matrix [tokens, tokens] of attention [layers, heads, tokens, tokens]."""
    tokens = weights.shape[-1]
    result = torch.eye(tokens)
    for layer in weights.mean(dim=1):
        mixed = layer + torch.eye(tokens)
        result = (mixed / mixed.sum(-1, keepdim=True)) @ result
    return result
