"""Requests as OpenAI's API takes them, and a few fields that other servers take, too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gateway.generation.request import MAX_LOGPROBS, MAX_STOP_CHARACTERS, MAX_STOPS
from gateway.generation.scenarios import ScenarioName

# Fields of OpenAI's that change nothing here: taken, and not looked at.
IGNORED_CHAT = frozenset(
    (
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    )
)
IGNORED_COMPLETION = frozenset(("user",))

# The length check also refuses lone surrogates, which pydantic lets pass without one.
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
_Token = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(BaseModel):
    """What a stream holds beside the text."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    include_usage: bool = Field(False, description="A last chunk with the usage figures.")


class WritingRequest(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str | None = Field(None, description="The model's name; absent: the one served.")
    temperature: float | None = Field(
        None,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="0: the most probable token always. Default: as the model's makers advise, "
        "else 1.",
    )
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus sampling.")
    top_k: int | None = Field(
        None, ge=-1, lt=2**31, description="The most probable so many; 0 or -1: all."
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="Least probability, relative to the most probable token's."
    )
    repetition_penalty: float | None = Field(
        None, gt=0, le=100, description="Above 1: tokens of prompt and text become less probable."
    )
    presence_penalty: _Penalty | None = Field(
        None, description="Subtracted from the logits of tokens in the text."
    )
    frequency_penalty: _Penalty | None = Field(
        None, description="Subtracted so many times as a token is in the text."
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="Equal seeds give equal texts."
    )
    n: int | None = Field(None, ge=1, description="How many texts.")
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="Texts that end the text, and are no part of it."
    )
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Added to the logits of tokens, by id."
    )
    stream: bool | None = Field(None, description="Server-sent events as the text is written.")
    stream_options: StreamOptions | None = None
    ignore_eos: bool = Field(False, description="Go on after the tokens that end a text.")
    draft_tokens: int | None = Field(
        None, ge=0, le=64, description="Tokens guessed ahead; has no influence on the text."
    )
    no_cache: bool = Field(False, description="Neither read nor write the answer cache.")


class JsonSchemaFormat(BaseModel):
    """A JSON schema that the text must fit."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", description="The schema.")


class ResponseFormat(BaseModel):
    """What the text must be."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class ChatCompletionRequest(WritingRequest):
    """A chat whose next message is wanted."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"messages": [{"role": "user", "content": "用一句话介绍长江。"}], "stream": True}
            ]
        }
    )

    messages: list[dict[str, Any]] = Field(
        min_length=1,
        description="Objects with `role`, `content` (text, or a list of text parts), and what "
        "else the model's chat template knows, such as `tool_calls`. With a model that describes "
        "pictures, the last one holds one `image_url` part with a data URL (PNG, JPEG, WebP, "
        "GIF): that picture is all that it is shown.",
    )
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="Most tokens to write.")
    max_completion_tokens: int | None = Field(
        None, ge=1, lt=2**31, description="The same, by its newer name."
    )
    logprobs: bool | None = Field(None, description="Log probabilities of the text's tokens.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="And of so many of the most probable ones."
    )
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = Field(
        None, description="For the chat template; calls come as the text that the model writes."
    )
    tool_choice: Literal["none", "auto"] | None = Field(
        None, description='"none": the template is shown no tools.'
    )
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = Field(None, description="For the chat template.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description='Variables for the chat template, such as {"enable_thinking": false}.'
    )
    continue_final_message: bool = Field(
        False, description="Continue the last message instead of beginning another."
    )
    scenario: ScenarioName | None = Field(
        None, description="Puts a ready prompt before the user's message; see /v1/scenarios."
    )
    to: str | None = Field(
        None,
        min_length=1,
        max_length=40,
        description='With scenario "translate": the language, such as "zh" or "French". '
        "Default: Chinese texts into English, others into Chinese.",
    )


class CompletionRequest(WritingRequest):
    """A prompt to be continued."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "The Yangtze is", "max_tokens": 32}]}
    )

    prompt: str | list[str] | list[_Token] | list[Annotated[list[_Token], Field(min_length=1)]] = (
        Field(description="Text, token ids, or a list of either.")
    )
    max_tokens: int | None = Field(
        16, ge=1, lt=2**31, description="Most tokens to write; null: as many as there is room for."
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Log probabilities, and of how many candidates."
    )
    echo: bool | None = Field(None, description="Whether the prompt is part of the text.")
    best_of: int | None = Field(None, description="Must equal n.")
    suffix: None = None
