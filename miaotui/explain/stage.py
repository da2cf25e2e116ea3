"""A stage's part in an explanation: forward with what the backward needs, and backward."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from miaotui.explain.attention import AttentionRecord
from miaotui.explain.layers import GradientLayer, gradient_layers
from miaotui.models.attention import PackedSequences
from miaotui.models.compressed import is_quantized
from miaotui.models.errors import BatchError, UnsupportedModelError
from miaotui.models.families import Skeleton
from miaotui.models.stage import StageModel, accept_hidden, accept_ids

# Memory that one pass through a whole model may take for its backward, on all stages together.
PASS_BYTES = 256 * 1024 * 1024
# float32 values kept for the backward, a token and layer, in units of the hidden size: inputs of
# the products, norms and activation.
_KEPT_VALUES = 17


@dataclass(frozen=True, slots=True)
class Target:
    """A span of a window: the logit that is explained is `first`'s start plus `last`'s end."""

    first: int
    last: int

    @property
    def places(self) -> list[int]:
        """Both tokens, or the one that is both."""
        return [self.first] if self.first == self.last else [self.first, self.last]


@dataclass(frozen=True, slots=True)
class ExplainedWindow:
    """A window whose answer is explained.

    `input_ids` int64 [tokens]; `token_type_ids` likewise, or None; `replaced` bool [tokens]: the
    tokens whose word embedding is the padding token's at the baseline. The others (special
    tokens) stay as they are on the whole path, and so are attributed nothing.
    """

    input_ids: torch.Tensor
    token_type_ids: torch.Tensor | None
    replaced: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(slots=True)
class ForwardPass:
    """What a forward leaves for the backward.

    `tokens`: of all points. `output`: float32 [tokens, hidden_size], on the CPU; None at the last
    stage, which has `logits`, float64 [points], in its place.
    """

    points: int
    tokens: int
    output: torch.Tensor | None
    logits: torch.Tensor | None
    _leaf: torch.Tensor
    _end: torch.Tensor

    def backward(self, gradient: torch.Tensor | None) -> torch.Tensor:
        """Return the gradients with respect to the pass's input, float32 on the CPU.

        `gradient`: with respect to `output`; None at the last stage, where it is the sum of
        `logits` whose gradient is taken. To be called once.
        """
        if gradient is not None:
            gradient = gradient.to(self._end.device)
        (found,) = torch.autograd.grad(self._end, self._leaf, gradient)
        return found.cpu()


class ExplainStage:
    """Computes a stage's layers with gradients, in float32. Shares the stage's parameters.

    The modules are copies: those of a stage that serves are never touched, so this may run on
    another thread at the same time. Where the stage holds parameters packed or in half precision,
    there are float32 copies of them from the first pass until `release`, because the rounding of
    half precision is far above the error that completeness allows. Use from one thread at a time.
    """

    def __init__(self, model: StageModel) -> None:
        """Take a loaded stage of an extractive model.

        Raises:
            UnsupportedModelError: its weights are quantised, or it reads passages apart.
        """
        if model.shape.decomposed_layers:
            raise UnsupportedModelError(
                f"{model.info.model_name} reads questions and passages apart, which explanations "
                "do not follow; serve the model that it was made from to have answers explained"
            )
        if is_quantized(model.skeleton.root):
            raise UnsupportedModelError(
                f"{model.info.model_name} is quantised, and rounding has no gradients; serve the "
                "checkpoint that it was made from to have its answers explained"
            )
        self.info = model.info
        self.shape = model.shape
        self._skeleton = model.skeleton
        self._device = torch.device(model.info.device)
        self._held: _Float32 | None = None

    def release(self) -> None:
        """Lets go of the copies; the next pass makes new ones."""
        self._held = None

    @property
    def holds_copies(self) -> bool:
        """Whether there are any."""
        return self._held is not None

    @property
    def pass_tokens(self) -> int:
        """Tokens of a pass that keep to `PASS_BYTES`."""
        token = _KEPT_VALUES * 4 * self.info.hidden_size * self.info.model_layers
        return max(1, PASS_BYTES // token)

    def words(self, window: ExplainedWindow) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (baseline, input minus baseline): float32 [tokens, embedding_size] each.

        The baseline holds the padding token's word embedding, or zeros in models without one.

        Raises:
            BatchError: the window does not fit this stage or model.
        """
        ids, _ = self._accept_window(window)
        embedding = self._skeleton.embedding
        assert embedding is not None
        with torch.no_grad():
            words = embedding.words(ids).float()
            pad = embedding.pad_token_id
            if pad is None:
                empty = torch.zeros_like(words[:1])
            else:
                empty = embedding.words(ids.new_tensor([pad])).float()
            replaced = window.replaced.to(self._device)[:, None]
            baseline = torch.where(replaced, empty, words)
            return baseline, words - baseline

    def start(
        self,
        window: ExplainedWindow,
        baseline: torch.Tensor,
        points: torch.Tensor,
        target: Target,
    ) -> ForwardPass:
        """Stage 0: the pass of word embeddings [points, tokens, embedding_size].

        `points`: differences from `baseline`, likewise.
        """
        count, tokens = points.shape[:2]
        ids, types = self._accept_window(window)
        packed = PackedSequences.of([tokens] * count, self._device)
        with torch.enable_grad():
            leaf = (baseline + points.to(self._device)).requires_grad_()
            embedding = self._float32().skeleton.embedding
            assert embedding is not None
            hidden = embedding(
                ids.repeat(count),
                None if types is None else types.repeat(count),
                packed,
                leaf.view(count * tokens, -1),
            )
            return self._run(leaf, hidden, packed, target)

    def resume(self, hidden: torch.Tensor, points: int, target: Target) -> ForwardPass:
        """Other stages: the pass of float32 activations [points * tokens, hidden_size].

        Raises:
            BatchError: they do not fit this stage.
        """
        packed = self._pack(hidden, points, target)
        with torch.enable_grad():
            leaf = self._accept_hidden(hidden).requires_grad_()
            return self._run(leaf, leaf, packed, target)

    def attend(
        self, inputs: ExplainedWindow | torch.Tensor, target: Target
    ) -> tuple[torch.Tensor, AttentionRecord, float | None]:
        """Run one sequence and keep its attention.

        `inputs`: the window at stage 0, else float32 activations [tokens, hidden_size].

        Returns:
            The output, float32 [tokens, hidden_size] on the CPU; the attention; and at the
            last stage the target's logit.

        Raises:
            BatchError: the input does not fit this stage.
        """
        with torch.no_grad():
            skeleton = self._float32().skeleton
            if isinstance(inputs, ExplainedWindow):
                ids, types = self._accept_window(inputs)
                self._check_target(len(inputs), target)
                packed = PackedSequences.of([len(inputs)], self._device)
                assert skeleton.embedding is not None
                hidden = skeleton.embedding(ids, types, packed)
            else:
                packed = self._pack(inputs, 1, target)
                hidden = self._accept_hidden(inputs)
            record = AttentionRecord(target.first, target.last)
            for layer in skeleton.layers:
                hidden = layer(hidden[None], None, packed=packed, observe=record)[0]
            if skeleton.head is None:
                return hidden.cpu(), record, None
            logits = _logits(skeleton.head(hidden[target.places]), 1)
            return hidden.cpu(), record, float(logits[0])

    def _run(
        self, leaf: torch.Tensor, hidden: torch.Tensor, packed: PackedSequences, target: Target
    ) -> ForwardPass:
        float32 = self._float32()
        *layers, last = float32.layers
        points, tokens = len(packed.lengths), len(hidden)
        for layer in layers:
            hidden = layer(hidden, packed)
        if float32.skeleton.head is None:
            hidden = last(hidden, packed)
            return ForwardPass(points, tokens, hidden.detach().cpu(), None, leaf, hidden)
        # Of the last layer's output, the target's tokens are all that matters.
        asked = last.at(hidden, packed, target.places)
        logits = _logits(float32.skeleton.head(asked), points)
        found = logits.detach().double().cpu()
        return ForwardPass(points, tokens, None, found, leaf, logits.sum())

    def _float32(self) -> _Float32:
        held = self._held
        if held is None:
            skeleton = _in_float32(self._skeleton)
            layers = gradient_layers(skeleton.layers, self.shape.model_type, self.shape.heads)
            held = self._held = _Float32(skeleton, layers)
        return held

    def _accept_window(self, window: ExplainedWindow) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens, shape = len(window), self.shape
        if self._skeleton.embedding is None:
            raise BatchError("this stage does not embed token ids; windows go to stage 0")
        if not 1 <= tokens <= shape.max_sequence_length:
            raise BatchError(
                f"a window of {tokens} tokens; this model takes 1 to {shape.max_sequence_length}"
            )
        if window.replaced.shape != (tokens,):
            raise BatchError(f"replaced has shape {list(window.replaced.shape)}, not [{tokens}]")
        ids = accept_ids(window.input_ids, "input_ids", shape.vocab_size, tokens, self._device)
        if window.token_type_ids is None or not shape.type_vocab_size:
            return ids, None
        types = accept_ids(
            *(window.token_type_ids, "token_type_ids", shape.type_vocab_size, tokens),
            self._device,
        )
        return ids, types

    def _accept_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        expected = (len(hidden), self.info.hidden_size)
        accepted = accept_hidden(hidden, expected, self._device, torch.float32)
        # The bytes may be a message's, which nothing may write to.
        return accepted.detach().clone()

    def _pack(self, hidden: torch.Tensor, points: int, target: Target) -> PackedSequences:
        rows = len(hidden)
        if self._skeleton.embedding is not None:
            raise BatchError("activations came to stage 0, which takes windows")
        if not 1 <= points <= rows or rows % points:
            raise BatchError(f"{rows} rows of activations do not divide into {points} points")
        tokens = rows // points
        if tokens > self.shape.max_sequence_length:
            raise BatchError(
                f"sequences of {tokens} tokens; this model takes 1 to "
                f"{self.shape.max_sequence_length}"
            )
        self._check_target(tokens, target)
        return PackedSequences.of([tokens] * points, self._device)

    @staticmethod
    def _check_target(tokens: int, target: Target) -> None:
        if not 0 <= target.first <= target.last < tokens:
            raise BatchError(
                f"a span of tokens {target.first} to {target.last} of a window of {tokens}"
            )


@dataclass(frozen=True, slots=True)
class _Float32:
    """What a stage computes with: its modules, and the layers with gradients."""

    skeleton: Skeleton
    layers: list[GradientLayer]


def _logits(rows: torch.Tensor, points: int) -> torch.Tensor:
    """The target's logit at each point, [points], of the head's output at its places."""
    by_point = rows.view(points, -1, 2)
    found: torch.Tensor = by_point[:, 0, 0] + by_point[:, -1, 1]
    return found


def _in_float32(skeleton: Skeleton) -> Skeleton:
    """The same modules, copied, over the same parameters where these are float32."""
    shared: dict[int, object] = {}
    for parameter in skeleton.root.parameters():
        converted = parameter
        if parameter.dtype is not torch.float32:
            converted = nn.Parameter(parameter.detach().float(), requires_grad=False)
        shared[id(parameter)] = converted
    return copy.deepcopy(skeleton, shared)


def split_points(points: Sequence[float], tokens: int, pass_tokens: int) -> list[list[float]]:
    """Return the points in passes of at most `pass_tokens` tokens, or of one point."""
    size = max(1, pass_tokens // tokens)
    return [list(points[first : first + size]) for first in range(0, len(points), size)]
