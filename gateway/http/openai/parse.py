"""From OpenAI's requests to the generator's."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from gateway.errors import FieldError, GatewayError
from gateway.generation.request import GenerationRequest, Prompt, Sampling, TokenPrompt
from gateway.generation.scenarios import SCENARIOS
from gateway.http.openai.pictures import IMAGE_PART, TEXT_ONLY, Picture, Pictures
from gateway.http.openai.schema import (
    IGNORED_CHAT,
    IGNORED_COMPLETION,
    ChatCompletionRequest,
    CompletionRequest,
    ResponseFormat,
    WritingRequest,
)
from gateway.schema import field_errors, invalid
from gateway.settings import GatewaySettings
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb

_Model = TypeVar("_Model", bound=WritingRequest)
# Far below what exhausts a stack, here or in a chat template.
MAX_DEPTH = 64
_ANY_JSON = '{"type":"object"}'


class Chat(NamedTuple):
    """A chat request, as it was read and as the generator takes it."""

    read: ChatCompletionRequest
    request: GenerationRequest
    picture: Picture | None = None
    """What the text is to be about."""


class Completion(NamedTuple):
    """A completion request, and one for the generator a prompt."""

    read: CompletionRequest
    requests: list[GenerationRequest]


def parse_chat(body: Any, settings: GatewaySettings) -> Chat:
    """Raises `GatewayError` (invalid-request) naming each fault and its place."""
    read = _validated(ChatCompletionRequest, body, IGNORED_CHAT)
    if read.top_logprobs is not None and not read.logprobs:
        raise _fault("/top_logprobs", "needs logprobs to be true")
    if read.max_tokens and read.max_completion_tokens:
        raise _fault("/max_tokens", "must not be set together with max_completion_tokens")
    prompt = tokenizer_pb.ChatPrompt(continue_last=read.continue_final_message)
    characters = 0
    pictures = Pictures(settings, f"/messages/{len(read.messages) - 1}")
    for index, message in enumerate(read.messages):
        role, content, more = _message(message, f"/messages/{index}", pictures)
        characters += len(content) + len(more)
        prompt.messages.add(role=role, content=content, more_json=more)
    characters += _set_scene(read, prompt)
    if read.tools and read.tool_choice != "none":
        prompt.tools_json = _json(read.tools, "/tools")
    variables = dict(read.chat_template_kwargs or {})
    if read.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", read.reasoning_effort)
    if variables:
        prompt.variables_json = _json(variables, "/chat_template_kwargs")
    characters += len(prompt.tools_json) + len(prompt.variables_json)
    _check_size(characters, "/messages", settings)
    logprobs = (read.top_logprobs or 0) if read.logprobs else None
    request = _request(
        read,
        prompt,
        _sampling(read, logprobs, _schema(read.response_format)),
        read.max_completion_tokens or read.max_tokens or 0,
        settings,
    )
    return Chat(read, request, pictures.found)


def parse_completion(body: Any, settings: GatewaySettings) -> Completion:
    """Raises `GatewayError` (invalid-request) naming each fault and its place."""
    read = _validated(CompletionRequest, body, IGNORED_COMPLETION)
    n = read.n or 1
    if read.best_of is not None and read.best_of != n:
        raise _fault("/best_of", "must equal n: texts are not ranked here")
    if read.echo and read.logprobs is not None:
        raise _fault("/echo", "has no log probabilities of the prompt; leave one of both out")
    prompts = _prompts(read.prompt)
    if len(prompts) * n > settings.max_texts:
        raise _fault("/prompt", f"{settings.max_texts} texts are the most, prompts times n")
    _check_size(sum(map(_size, prompts)), "/prompt", settings)
    sampling = _sampling(read, read.logprobs, "")
    return Completion(
        read,
        [_request(read, prompt, sampling, read.max_tokens or 0, settings) for prompt in prompts],
    )


def _validated(model: type[_Model], body: Any, ignored: frozenset[str]) -> _Model:
    if isinstance(body, dict):
        body = {name: value for name, value in body.items() if name not in ignored}
    try:
        return model.model_validate(body)
    except ValidationError as error:
        # One fault a field: each way in which a value may be written has its own otherwise.
        faults: dict[str, FieldError] = {}
        for fault in field_errors(error, model=model):
            place = "/".join(fault.pointer.split("/")[:2])
            faults.setdefault(place, FieldError(place, fault.detail))
        raise invalid(list(faults.values())) from None


def _message(message: Mapping[str, Any], pointer: str, pictures: Pictures) -> tuple[str, str, str]:
    """(role, content, further fields as JSON)"""
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise _fault(f"{pointer}/role", "must be a text")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(
            _part(part, f"{pointer}/content/{index}", pictures)
            for index, part in enumerate(content)
        )
    elif content is None:
        content = ""
    elif not isinstance(content, str):
        raise _fault(f"{pointer}/content", "must be a text or a list of text parts")
    more = {name: value for name, value in message.items() if name not in ("role", "content")}
    calls = more.get("tool_calls")
    if isinstance(calls, list):
        more["tool_calls"] = [_tool_call(call) for call in calls]
    return (
        _unicode(role, f"{pointer}/role"),
        _unicode(content, f"{pointer}/content"),
        _json(more, pointer) if more else "",
    )


def _set_scene(read: ChatCompletionRequest, prompt: tokenizer_pb.ChatPrompt) -> int:
    """Puts the scenario's instruction before a user's message; returns its length.

    Not as a system message: not every model's template knows those.
    """
    if read.scenario is None:
        if read.to is not None:
            raise _fault("/to", 'needs "scenario": "translate"')
        return 0
    scenario = SCENARIOS[read.scenario]
    if read.to is not None and not scenario.needs_target:
        raise _fault("/to", 'needs "scenario": "translate"')
    said = [message for message in prompt.messages if message.role == "user"]
    if not said:
        raise _fault("/scenario", 'needs a message of the role "user"')
    message = said[0] if scenario.whole_chat else said[-1]
    before = len(message.content)
    message.content = scenario.before(message.content, read.to)
    return len(message.content) - before


def _part(part: Any, pointer: str, pictures: Pictures) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return str(part["refusal"])
    if kind == IMAGE_PART:
        pictures.take(part, pointer)
        return ""
    if isinstance(kind, str) and kind.startswith(("image", "input_", "audio", "video", "file")):
        raise _fault(pointer, TEXT_ONLY)
    raise _fault(pointer, 'must be a text part: {"type": "text", "text": …}')


def _tool_call(call: Any) -> Any:
    """The arguments as an object: templates write them so, and callers send a JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except (ValueError, RecursionError):
            return call
        if isinstance(arguments, dict):
            return {**call, "function": {**function, "arguments": arguments}}
    return call


def _size(prompt: str | TokenPrompt) -> int:
    return len(prompt) if isinstance(prompt, str) else len(prompt.ids) // 4


def _prompts(prompt: str | Sequence[Any]) -> list[str | TokenPrompt]:
    if isinstance(prompt, str):
        return [_unicode(prompt, "/prompt")]
    if not prompt:
        raise _fault("/prompt", "must not be empty")
    if isinstance(prompt[0], int):
        return [TokenPrompt(array("i", prompt).tobytes())]
    return [
        _unicode(one, f"/prompt/{index}")
        if isinstance(one, str)
        else TokenPrompt(array("i", one).tobytes())
        for index, one in enumerate(prompt)
    ]


def _schema(wanted: ResponseFormat | None) -> str:
    if wanted is None or wanted.type == "text":
        return ""
    if wanted.type == "json_object":
        return _ANY_JSON
    if wanted.json_schema is None:
        raise _fault("/response_format/json_schema", "this field is required")
    return _json(wanted.json_schema.schema_, "/response_format/json_schema/schema")


def _sampling(read: WritingRequest, logprobs: int | None, json_schema: str) -> Sampling:
    bias: dict[int, float] = {}
    for token, value in (read.logit_bias or {}).items():
        if not token.isdecimal() or len(token) > 9:
            raise _fault("/logit_bias", "its names must be token ids")
        bias[int(token)] = value
    top_k = read.top_k
    return Sampling(
        temperature=read.temperature,
        top_k=0 if top_k == -1 else top_k,
        top_p=read.top_p,
        min_p=read.min_p,
        repetition_penalty=read.repetition_penalty,
        presence_penalty=read.presence_penalty or 0.0,
        frequency_penalty=read.frequency_penalty or 0.0,
        seed=None if read.seed is None else read.seed % 2**64,
        logprobs=logprobs,
        logit_bias=bias,
        json_schema=json_schema,
    )


def _request(
    read: WritingRequest,
    prompt: Prompt,
    sampling: Sampling,
    max_tokens: int,
    settings: GatewaySettings,
) -> GenerationRequest:
    n = read.n or 1
    if n > settings.max_texts:
        raise _fault("/n", f"must be at most {settings.max_texts}")
    return GenerationRequest(
        prompt=prompt,
        sampling=sampling,
        max_tokens=max_tokens,
        n=n,
        stop=(read.stop,) if isinstance(read.stop, str) else tuple(read.stop or ()),
        ignore_end=read.ignore_eos,
        draft_tokens=read.draft_tokens,
        no_cache=read.no_cache,
    )


def _check_size(characters: int, pointer: str, settings: GatewaySettings) -> None:
    limit = settings.max_context_characters
    if characters > limit:
        raise _fault(pointer, f"must have at most {limit} characters in all")


def _json(value: Any, pointer: str) -> str:
    inner, depth = [value], 0
    while inner := [
        part
        for outer in inner
        if isinstance(outer, dict | list)
        for part in (outer.values() if isinstance(outer, dict) else outer)
    ]:
        depth += 1
        if depth > MAX_DEPTH:
            raise _fault(pointer, f"must not be nested deeper than {MAX_DEPTH} levels")
    return _unicode(json.dumps(value, ensure_ascii=False, separators=(",", ":")), pointer)


def _unicode(text: str, pointer: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _fault(pointer, "must be valid Unicode, without lone surrogates") from None
    return text


def _fault(pointer: str, detail: str) -> GatewayError:
    return invalid([FieldError(pointer, detail)])
