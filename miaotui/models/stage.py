"""One stage of an encoder: embeddings if it is the first, layers, head if the last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from miaotui.models.attention import PackedSequences
from miaotui.models.checkpoint import Checkpoint
from miaotui.models.compressed import is_quantized
from miaotui.models.decomposed import PassageCache, read_apart
from miaotui.models.errors import BatchError, UnsupportedModelError
from miaotui.models.families import ExtractiveFamily, MeanPooling, Skeleton
from miaotui.models.filling import fill_skeleton
from miaotui.models.fused import Layer, distinct, encoder_layers, takes_round_rows
from miaotui.models.layers import LayerRange
from miaotui.models.memory import trim_heap
from miaotui.models.packed import MOST_ROWS, rounded_rows
from miaotui.models.precision import resolve_device, resolve_dtype
from miaotui.models.shape import ModelShape, Task
from miaotui.models.stage_info import StageInfo, held_layers, inspect_model, parameter_bytes

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class StageBatch:
    """A stage's input: sequences laid end to end, without padding.

    `input_ids` and (optional) `token_type_ids`, integer [tokens], for the first stage;
    `hidden`, [tokens, hidden_size] of any floating-point type, for the others. `lengths` are
    the sequences' tokens, in order. `salts`, one a sequence, for the first stage of a model
    that reads passages apart: only sequences of equal salt share what was computed; None: all.
    `found`: what was kept elsewhere of its passages, by `passage_key`, each [tokens, hidden_size]
    in the compute dtype.
    """

    lengths: Sequence[int]
    input_ids: torch.Tensor | None = None
    token_type_ids: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    salts: Sequence[bytes] | None = None
    found: Mapping[bytes, torch.Tensor] | None = None


class StageModel:
    """The modules of one stage, ready to compute. Use from one thread at a time."""

    def __init__(
        self,
        skeleton: Skeleton,
        shape: ModelShape,
        info: StageInfo,
        *,
        fuse: bool = True,
        attention: torch.dtype = torch.float32,
        passages: PassageCache | None = None,
    ) -> None:
        """Take loaded modules; use `load` instead."""
        self.info = info
        self.passages = passages
        self.shape = shape
        self._skeleton = skeleton
        self._device = torch.device(info.device)
        self._dtype = next(skeleton.layers[0].parameters()).dtype
        self._steps = encoder_layers(
            skeleton.layers, shape.model_type, shape.heads, fuse=fuse, attention=attention
        )
        self._attention = attention
        self._rounds = takes_round_rows(self._steps)
        apart = max(0, shape.decomposed_layers - info.first_layer)
        self._apart, self._together = self._steps[:apart], self._steps[apart:]

    @classmethod
    def load(
        cls,
        directory: Path | str,
        layers: LayerRange | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        fingerprint: str | None = None,
        fuse: bool = True,
        task: Task = "auto",
        passage_cache_bytes: int = 0,
    ) -> StageModel:
        """Read a stage from a Hugging Face model directory: its own tensors and no others.

        Args:
            directory: holds `config.json` and safetensors weights.
            layers: the layers to hold; None: all.
            dtype: "auto", "fast", "float32", "float16" or "bfloat16", or a torch dtype. The head
                is held and computed in float32 whatever this says: it is tiny, and logits that
                differ by less than bfloat16 resolves decide between spans. Quantised checkpoints
                compute in float32, and in this dtype their attention only; "auto" is "fast" there.
            device: "auto", "cpu", "cuda", "cuda:N".
            fingerprint: the model's, where it is known already; None: computed or cached.
            fuse: on a CPU, compute by `miaotui.models.fused` instead of transformers' layers.
            task: "embed": the last stage returns vectors of texts, whatever head there is.
            passage_cache_bytes: what the first stage of a model that reads passages apart
                (`decomposed`) may keep of them; others keep nothing.

        Raises:
            UnsupportedModelError: not a family or head that can be served.
            CheckpointError: files are missing, damaged or do not belong together.
            PartitionError: the model has no such layers, or these must stay with others.
            ValueError: no such dtype or device.
        """
        directory = Path(directory)
        target = resolve_device(device)
        compute = attention = resolve_dtype(dtype, target)
        checkpoint = Checkpoint.open(directory)
        family, config, shape = inspect_model(checkpoint, task)
        if not isinstance(family, ExtractiveFamily):
            raise UnsupportedModelError(
                f"{directory}: a {family.model_type} model generates text and does not find "
                "answers; give one with a question-answering head"
            )
        checkpoint = family.adapted(checkpoint)
        layers = held_layers(directory, layers, shape)
        skeleton = family.skeleton(config, layers)
        whole = family.skeleton(config, LayerRange(0, shape.layers))
        if is_quantized(whole.root):
            # Integer products give float32, and what little is left between them is computed so.
            attention = resolve_dtype("fast" if dtype == "auto" else dtype, target)
            compute = torch.float32
        size, whole_size = (parameter_bytes(s, compute) for s in (skeleton, whole))
        fill_skeleton(skeleton, checkpoint, compute, target)
        info = StageInfo.of(
            directory,
            layers,
            shape,
            compute,
            target,
            fingerprint=fingerprint,
            parameter_bytes=size,
            model_parameter_bytes=whole_size,
        )
        passages = None
        if shape.decomposed_layers and info.is_first and passage_cache_bytes:
            passages = PassageCache(passage_cache_bytes)
        stage = cls(skeleton, shape, info, fuse=fuse, attention=attention, passages=passages)
        trim_heap()
        return stage

    @torch.inference_mode()
    def run(self, batch: StageBatch) -> torch.Tensor:
        """Compute what this stage computes.

        Returns:
            [tokens, hidden_size] in the compute dtype, or on the last stage float32
            [tokens, 2]: each token's logit to be an answer's first and last, or, of an embedding
            model, [sequences, hidden_size], vectors of length 1. On `info.device`.

        Raises:
            BatchError: the batch does not fit this stage.
        """
        packed = self._pack(batch.lengths)
        if self._skeleton.embedding is not None:
            if batch.input_ids is None:
                raise BatchError("the first stage takes input_ids, and got none")
            hidden = self._begin(batch, batch.input_ids, packed)
        elif batch.hidden is None:
            raise BatchError(f"the stage of layers {self._range} takes hidden, and got none")
        else:
            hidden = self._accept(batch.hidden, packed)
        hidden = self._layers(hidden, packed, self._together)
        if self._skeleton.head is None:
            return hidden
        if isinstance(self._skeleton.head, MeanPooling):
            vectors: torch.Tensor = self._skeleton.head(hidden.to(torch.float32), batch.lengths)
            return vectors
        return self._head(hidden)

    @torch.inference_mode()
    def embed(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        """Return the embeddings [tokens, hidden_size] of integer ids [tokens].

        Raises:
            BatchError: not the first stage; lengths or ids out of range.
        """
        return self._embed(input_ids, token_type_ids, self._pack(lengths))

    @torch.inference_mode()
    def layers(self, hidden: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Return this stage's layers' output [tokens, hidden_size] for such an input.

        Raises:
            BatchError: lengths or shape do not fit.
        """
        packed = self._pack(lengths)
        return self._layers(self._accept(hidden, packed), packed, self._steps)

    @torch.inference_mode()
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 span logits [tokens, 2] (start, end) of [tokens, hidden_size].

        Raises:
            BatchError: not the last stage.
        """
        return self._head(hidden)

    @property
    def dtype(self) -> torch.dtype:
        """Of what its layers return."""
        return self._dtype

    @property
    def reading(self) -> str:
        """What the decomposed layers' output for a passage depends on, besides the passage."""
        layers = f"{len(self._apart)} {self._dtype} {self._attention} {self._device.type}"
        return f"{self.info.fingerprint} {layers}"

    @property
    def skeleton(self) -> Skeleton:
        """The stage's modules, which must not be changed."""
        return self._skeleton

    def warm_up(self) -> None:
        """Run one batch of made-up tokens, so that no request pays for first-call set-up."""
        lengths = [min(64, self.info.max_sequence_length)]
        tokens = sum(lengths)
        if self.info.is_first:
            batch = StageBatch(lengths, input_ids=torch.zeros(tokens, dtype=torch.int64))
        else:
            batch = StageBatch(lengths, hidden=torch.zeros(tokens, self.info.hidden_size))
        self.run(batch)

    def rehearse(self) -> Iterator[int]:
        """Compute made-up tokens in every number of rows that requests will come in.

        Yields each, once the kernels for it are there (`packed.rounded_rows`); nothing where
        kernels take any number.
        """
        if not self._rounds:
            return
        rows = sorted({rounded_rows(tokens) for tokens in range(1, MOST_ROWS + 1)})
        layers = distinct(self._steps)
        for count in rows:
            with torch.inference_mode():
                hidden = torch.zeros(count, self.info.hidden_size, dtype=self._dtype)
                for layer in layers:
                    layer(hidden, PackedSequences.of([count], self._device))
            yield count

    @property
    def _range(self) -> LayerRange:
        return LayerRange(self.info.first_layer, self.info.end_layer)

    def _pack(self, lengths: Sequence[int]) -> PackedSequences:
        limit = self.info.max_sequence_length
        if not lengths:
            raise BatchError("the batch holds no sequence")
        if min(lengths) < 1 or max(lengths) > limit:
            raise BatchError(
                f"sequences of {min(lengths)} to {max(lengths)} tokens; this model takes 1 to "
                f"{limit}"
            )
        return PackedSequences.of(lengths, self._device)

    def _embed(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        packed: PackedSequences,
    ) -> torch.Tensor:
        if self._skeleton.embedding is None:
            raise BatchError(f"the stage of layers {self._range} does not embed token ids")
        tokens, shape = packed.offsets[-1], self.shape
        ids = accept_ids(input_ids, "input_ids", shape.vocab_size, tokens, self._device)
        types = None
        if token_type_ids is not None and shape.type_vocab_size:
            types = accept_ids(
                token_type_ids, "token_type_ids", shape.type_vocab_size, tokens, self._device
            )
        return self._skeleton.embedding(ids, types, packed)

    def _accept(self, hidden: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        expected = (packed.offsets[-1], self.info.hidden_size)
        return accept_hidden(hidden, expected, self._device, self._dtype)

    def _begin(
        self, batch: StageBatch, input_ids: torch.Tensor, packed: PackedSequences
    ) -> torch.Tensor:
        """What the layers that read question and passage together take."""
        types = batch.token_type_ids
        if not self._apart:
            return self._embed(input_ids, types, packed)
        # Before the batch is cut into parts, whose sizes would not say what is wrong.
        accept_ids(input_ids, "input_ids", self.shape.vocab_size, packed.offsets[-1], _CPU)
        if types is not None:
            accept_ids(
                types, "token_type_ids", self.shape.type_vocab_size, packed.offsets[-1], _CPU
            )
        found = None
        if batch.found:
            found = {name: rows.to(self._device) for name, rows in batch.found.items()}
        return read_apart(
            input_ids, types, batch.lengths, self._read_parts, self.passages, batch.salts, found
        )

    def _read_parts(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        parts = self._pack(lengths)
        return self._layers(self._embed(input_ids, token_type_ids, parts), parts, self._apart)

    def _layers(
        self, hidden: torch.Tensor, packed: PackedSequences, steps: Sequence[Layer]
    ) -> torch.Tensor:
        if not self._rounds:
            return _through(steps, hidden, packed)
        groups = packed.groups(MOST_ROWS)
        parts = hidden.split([group.offsets[-1] for group in groups])
        done = [_rounded(steps, *part) for part in zip(parts, groups, strict=True)]
        return done[0] if len(done) == 1 else torch.cat(done)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._skeleton.head is None:
            raise BatchError(f"the stage of layers {self._range} has no head")
        logits: torch.Tensor = self._skeleton.head(hidden.to(torch.float32))
        return logits


def _rounded(steps: Sequence[Layer], hidden: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
    tokens = len(hidden)
    if extra := rounded_rows(tokens) - tokens:
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, extra))
    return _through(steps, hidden, packed)[:tokens]


def _through(steps: Sequence[Layer], hidden: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
    for step in steps:
        hidden = step(hidden, packed)
    return hidden


def accept_ids(
    ids: torch.Tensor, name: str, size: int, tokens: int, device: torch.device
) -> torch.Tensor:
    """Return a batch's ids as int64 [tokens] on a device.

    Raises:
        BatchError: they are of another shape, or not all from 0 to `size` - 1.
    """
    if ids.shape != (tokens,):
        raise BatchError(f"{name} has shape {list(ids.shape)}; the lengths call for [{tokens}]")
    # On CUDA an index out of range would bring down the whole process, so it is looked for
    # here, while the ids still lie on the CPU.
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= size:
        raise BatchError(
            f"{name} range from {low} to {high}; this model takes 0 to {size - 1}. "
            "Was the text tokenised for another model?"
        )
    return ids.to(device=device, dtype=torch.int64)


def accept_hidden(
    hidden: torch.Tensor, expected: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Return a batch's activations on a device, in a dtype.

    Raises:
        BatchError: they are not of the `expected` shape, [tokens, hidden_size].
    """
    if hidden.shape != expected:
        raise BatchError(
            f"hidden has shape {list(hidden.shape)}; lengths and model call for {list(expected)}"
        )
    return hidden.to(device=device, dtype=dtype)
