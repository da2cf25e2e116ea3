"""What layers attend to: the answer's rows of every head, and their rollout.

Rollout (Abnar and Zuidema 2020, arXiv:2005.00928): attention averaged over a layer's heads, with
the identity added for the residual and normalised, multiplied over the layers. Only the answer's
rows are asked for, so no matrix needs to be multiplied by another: a row goes through the layers
from the last to the first, and from stage to stage as one number a token.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad


class AttentionRecord:
    """Attention weights of one sequence, layer by layer, as an observer of `packed_attention`."""

    def __init__(self, first: int, last: int) -> None:
        """Keep the mean of the rows of the tokens `first` and `last`."""
        self._positions = [first] if first == last else [first, last]
        self._rows: list[torch.Tensor] = []
        self._means: list[torch.Tensor] = []

    def __call__(self, query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> None:
        """Take a layer's query and key, [1, heads, tokens, head_dim]."""
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = torch.matmul(query[0].float(), key[0].float().transpose(1, 2)) * scale
        weights = torch.softmax(scores, dim=-1)
        self._rows.append(weights[:, self._positions].mean(dim=1))
        self._means.append(weights.mean(dim=0))

    def rows(self, heads: int) -> torch.Tensor:
        """Return the answer's attention: float32 [layers, heads, tokens], on the CPU.

        Rows of heads that a layer lacks, because they were pruned, are all 0 and come last.
        """
        padded = [pad(row, (0, 0, 0, heads - len(row))) for row in self._rows]
        return torch.stack(padded).cpu()

    def start(self, tokens: int) -> torch.Tensor:
        """Return the row that rollout begins with after the last layer: float32 [tokens]."""
        row = torch.zeros(tokens)
        row[self._positions] = 1 / len(self._positions)
        return row

    def roll(self, row: torch.Tensor) -> torch.Tensor:
        """Take a row through these layers, from the last to the first: float32 [tokens].

        Rows of attention sum up to 1, so those of (attention + identity) / 2 do, too.
        """
        device = self._means[0].device
        rolled = row.to(device)
        for mean in reversed(self._means):
            rolled = (rolled @ mean + rolled) / 2
        return rolled.cpu()
