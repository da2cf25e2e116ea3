"""What of a generation request is checked before it is taken."""

from __future__ import annotations

import math

import numpy as np

from miaotui.engine.decode.types import GenerationRequest, SamplingParams, SourceFeatures


class InvalidRequestError(ValueError):
    """The request can never be served as it is; the message says why."""


def check_request(
    request: GenerationRequest,
    *,
    vocabulary: int,
    context: int,
    capacity: int | None,
    texts: int,
    source_shape: tuple[int, ...] = (),
) -> None:
    """Raises `InvalidRequestError` for what would fail, or harm others, later.

    `vocabulary`: token ids are below this; `context`: tokens that the model can take;
    `capacity`: tokens that the KV cache holds, None: not known yet; `texts`: most a request;
    `source_shape`: of what the encoder reads, empty: there is no encoder.
    """
    prompt = request.prompt
    if prompt.ndim != 1 or prompt.dtype != np.int32:
        raise InvalidRequestError(
            f"the prompt must be int32 [tokens], not {prompt.dtype} {list(prompt.shape)}"
        )
    _check_source(request.source, source_shape)
    if not len(prompt):
        raise InvalidRequestError("the prompt is empty")
    if int(prompt.min()) < 0 or int(prompt.max()) >= vocabulary:
        raise InvalidRequestError(f"the prompt's token ids must be from 0 to {vocabulary - 1}")
    check_fits(len(prompt), context=context, capacity=capacity)
    longest = max((len(text.token_ids) for text in request.written), default=0)
    if len(prompt) + longest > context:
        raise InvalidRequestError(
            f"prompt and what was written have {len(prompt) + longest} tokens; the model's context "
            f"has room for {context}"
        )
    if not 1 <= request.n <= texts:
        raise InvalidRequestError(f"n must be from 1 to {texts}, not {request.n}")
    if request.max_tokens < 0:
        raise InvalidRequestError(f"max_tokens must not be negative: {request.max_tokens}")
    if request.draft_tokens is not None and request.draft_tokens < 0:
        raise InvalidRequestError(f"draft_tokens must not be negative: {request.draft_tokens}")
    _check_sampling(request.sampling, vocabulary)


def check_fits(prompt: int, *, context: int, capacity: int | None) -> None:
    """Raises `InvalidRequestError` where a prompt of so many tokens leaves room for no text."""
    if prompt + 1 > context:
        raise InvalidRequestError(
            f"the prompt has {prompt} tokens; the model's context has room for {context}, "
            "the text included"
        )
    if capacity is not None and prompt + 1 > capacity:
        raise InvalidRequestError(
            f"the prompt has {prompt} tokens; the KV cache has room for {capacity}, "
            "the text included"
        )


def _check_source(source: SourceFeatures | None, shape: tuple[int, ...]) -> None:
    if source is None:
        if shape:
            raise InvalidRequestError(
                f"features: none; this model writes about float32 features of shape {list(shape)}"
            )
        return
    if not shape:
        raise InvalidRequestError("features: this model reads text only; send none")
    if source.dtype != np.float32 or source.shape != shape:
        raise InvalidRequestError(
            f"features: {source.dtype} of shape {list(source.shape)}; this model takes float32 of "
            f"shape {list(shape)}"
        )
    if not np.isfinite(source).all():
        raise InvalidRequestError("features: some are not finite numbers")


def _check_sampling(sampling: SamplingParams, vocabulary: int) -> None:
    bounds = (
        ("temperature", sampling.temperature, 0.0, math.inf),
        ("top_k", sampling.top_k, 0, math.inf),
        ("top_p", sampling.top_p, 0.0, 1.0),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("repetition_penalty", sampling.repetition_penalty, 0.0, math.inf),
        ("presence_penalty", sampling.presence_penalty, -math.inf, math.inf),
        ("frequency_penalty", sampling.frequency_penalty, -math.inf, math.inf),
        ("seed", sampling.seed, 0, 2**64 - 1),
        ("logprobs", sampling.logprobs or 0, 0, vocabulary),
    )
    for name, value, least, most in bounds:
        # Also false for what is not a number.
        if not (least <= value <= most and math.isfinite(value)):
            raise InvalidRequestError(f"{name} must be from {least:g} to {most:g}, not {value}")
    if sampling.top_p == 0.0 or sampling.repetition_penalty == 0.0:
        raise InvalidRequestError("top_p and repetition_penalty must be above 0")
    for token, bias in sampling.logit_bias.items():
        if not 0 <= token < vocabulary or math.isnan(bias):
            raise InvalidRequestError(
                f"logit_bias must map token ids from 0 to {vocabulary - 1} to numbers"
            )
