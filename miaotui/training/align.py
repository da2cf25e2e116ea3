"""First lessons for the new rows: a Chinese word should mean what its English gloss means.

The base is a sentence encoder. Its mean-pooled vector of the gloss is the teacher, its mean-pooled
vector of the word's characters the student, as in multilingual distillation (Reimers & Gurevych,
EMNLP 2020). Only the new rows learn; the encoder stays as it is, so English loses nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from miaotui.training.glosses import Entry, is_han
from miaotui.training.model import TrainingModel
from miaotui.training.vocab import Vocabulary

log = logging.getLogger(__name__)


def choose_words(
    texts: Iterable[str], entries: list[Entry], known: set[str], longest: int = 4
) -> list[tuple[str, str]]:
    """(word, gloss) pairs: words in simplified or traditional form that occur in ``texts``.

    Single characters are taken whether they occur or not; all characters must be ``known``.
    """
    grams: set[str] = set()
    for text in texts:
        for size in range(2, longest + 1):
            grams.update(text[i : i + size] for i in range(len(text) - size + 1))
    pairs: dict[str, list[str]] = {}
    for entry in entries:
        word = next((w for w in (entry.simplified, entry.traditional) if w in grams), "")
        if not word and len(entry.simplified) == 1:
            word = entry.simplified
        if word and entry.senses and all(c in known and is_han(c) for c in word):
            pairs.setdefault(word, []).extend(entry.senses[:2])
    return [(word, ", ".join(senses[:3])) for word, senses in pairs.items()]


def pad(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [batch, longest], padded with 0."""
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
    lengths = torch.tensor([len(s) for s in sequences])
    return ids, (torch.arange(longest) < lengths[:, None]).long()


def pooled(model: TrainingModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean of the last layer's states over the mask, float [batch, hidden]."""
    hidden = model.hidden(ids, mask, torch.zeros_like(ids))
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def align(
    model: TrainingModel,
    vocabulary: Vocabulary,
    base_tokenizer: Tokenizer,
    pairs: list[tuple[str, str]],
    *,
    epochs: int,
    seed: int,
    batch: int = 256,
    rate: float = 3e-3,
) -> list[float]:
    """Train the new rows in place; the mean loss (1 - cosine) of each epoch."""
    device = model.words.new.device
    words = [e.ids for e in vocabulary.tokenizer.encode_batch([w for w, _ in pairs])]
    glosses = [e.ids[:16] for e in base_tokenizer.encode_batch([g for _, g in pairs])]
    targets = torch.empty(len(pairs), model.config.hidden_size)
    order = sorted(range(len(pairs)), key=lambda i: len(glosses[i]))
    with torch.no_grad():
        for at in range(0, len(order), 512):
            part = order[at : at + 512]
            ids, mask = pad([glosses[i] for i in part])
            targets[part] = pooled(model, ids.to(device), mask.to(device)).float().cpu()
    targets = F.normalize(targets, dim=1)

    frozen = [p for p in model.parameters() if p is not model.words.new]
    for parameter in frozen:
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam([model.words.new], lr=rate, betas=(0.9, 0.98))
    steps = epochs * (len(pairs) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: max(0.0, 1 - s / steps))
    losses = []
    began = time.monotonic()
    for epoch in range(epochs):
        shuffle = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed + epoch))
        total = 0.0
        parts = [shuffle[i : i + batch].tolist() for i in range(0, len(pairs) - batch + 1, batch)]
        for part in parts:
            ids, mask = pad([words[i] for i in part])
            student = F.normalize(pooled(model, ids.to(device), mask.to(device)).float(), dim=1)
            loss = 1 - (student * targets[part].to(device)).sum(1).mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += float(loss.detach())
        losses.append(total / len(parts))
        log.info("align epoch %d loss %.4f (%.0f s)", epoch, losses[-1], time.monotonic() - began)
    for parameter in frozen:
        parameter.requires_grad_(True)
    return losses
