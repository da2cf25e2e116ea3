"""What goes in and comes out, for HTTP, gRPC and the orchestrator alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from gateway.errors import FieldError, GatewayError
from gateway.explanation import Explanation, WarningView
from gateway.settings import GatewaySettings

DEFAULT_TOP_K = 1
DEFAULT_ANSWER_LENGTH = 30


def _written(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("nul", "must not contain the NUL character (U+0000)")
    if text.isspace():
        raise PydanticCustomError("blank", "must not be empty or blank")
    return text


# The length check also refuses lone surrogates, which pydantic lets pass without one.
Text = Annotated[str, Field(min_length=1), AfterValidator(_written)]

# What questions over a passage and over a collection have in common, and their answers.
TopK = Annotated[int, Field(ge=1, le=50, description="Answers to return, best first.")]
AnswerLength = Annotated[int, Field(ge=1, le=512, description="Longest answer in tokens.")]
Normalization = Annotated[
    Literal["nfc", "nfkc", "none"],
    Field(description="Unicode normalisation before tokenising; offsets are unaffected."),
]
NoCache = Annotated[bool, Field(description="Neither read nor write the answer cache.")]
Start = Annotated[int, Field(ge=0, description="First character, in Unicode code points.")]
End = Annotated[int, Field(ge=0, description="One past the last character.")]

EXAMPLE_EN: dict[str, Any] = {
    "question": "When was the museum founded?",
    "context": "The Palace Museum in Beijing was founded in 1925 and holds 1.8 million objects.",
}
EXAMPLE_ZH: dict[str, Any] = {
    "question": "故宫博物院成立于哪一年？",
    "context": "故宫博物院位于北京，成立于1925年，藏品超过一百八十万件。",
    "top_k": 3,
}


class QaRequest(BaseModel):
    """A question over a passage."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [EXAMPLE_EN, EXAMPLE_ZH]},
    )

    question: Text = Field(description="The question.")
    context: Text = Field(description="The passage in which the answer stands.")
    top_k: TopK = DEFAULT_TOP_K
    max_answer_length: AnswerLength = DEFAULT_ANSWER_LENGTH
    no_answer_threshold: float | None = Field(
        None,
        allow_inf_nan=False,
        description='"No answer" is returned where its logit exceeds the best span\'s by more '
        "than this; null: there is always an answer. The model card says what suits the model.",
    )
    normalization: Normalization = "nfc"
    strip_markup: bool = Field(False, description="Whether HTML/XML markup is ignored.")
    no_cache: NoCache = False
    mode: Literal["extractive", "generative"] = Field(
        "extractive",
        description="extractive: the passage's own words; generative: a full sentence with "
        "citations, which needs a model that writes. Then top_k, no_answer_threshold, "
        "normalization and strip_markup have no meaning, and max_answer_length is 256 unless set.",
    )
    explain: bool = Field(
        False,
        description="Explain the answer: takes seconds, so not in a batch; extractive only.",
    )


class CacheStatus(StrEnum):
    """Where an answer came from."""

    MISS = "miss"
    HIT = "hit"
    SHARED = "shared"
    BYPASS = "bypass"


# These are not frozen: a frozen one takes three times as long to make, and answers are made by
# the thousand a second.
@dataclass(slots=True)
class Candidate:
    """One candidate answer; offsets in Unicode code points of the passage as sent."""

    text: Annotated[str, Field(description="The characters, as they stand in the passage.")]
    start: Start
    end: End
    score: Annotated[float, Field(description='Probability among all spans and "no answer".')]
    logit: Annotated[float, Field(description="Start logit plus end logit.")]


@dataclass(frozen=True, slots=True)
class Citation:
    """A part of the passage that a generated answer rests on."""

    start: Start
    end: End
    text: Annotated[str, Field(description="The characters, as they stand in the passage.")]


@dataclass(slots=True)
class Hop:
    """How long one hop took."""

    hop: Annotated[str, Field(description='"cache", "tokenizer", "queue", "stage 0", …, "read".')]
    milliseconds: float


@dataclass(slots=True)
class QaResponse:
    """The answer to one question."""

    answerable: Annotated[
        bool, Field(description="Whether the passage holds an answer, by the threshold.")
    ]
    answers: Annotated[
        list[Candidate],
        Field(description="Best first; empty where not answerable and top_k is 1."),
    ]
    no_answer_score: Annotated[
        float, Field(description='Logit of "no answer" minus the best span\'s.')
    ]
    model: Annotated[str, Field(description="The model's name.")]
    model_fingerprint: Annotated[str, Field(description="Hash of the model.")]
    cache: Annotated[
        CacheStatus,
        Field(
            description="miss: computed for this request; hit: from the answer cache; shared: "
            "computed once for this and an equal request at the same time; bypass: not asked."
        ),
    ]
    timings: Annotated[list[Hop], Field(description="Where the time went.")]
    trace_id: Annotated[str, Field(description="The trace's id, 32 hex digits.")]
    request_id: Annotated[str, Field(description="The request's id.")]
    answer: Annotated[
        str | None, Field(description="generative: the answer in a sentence; else null.")
    ] = None
    citations: Annotated[
        list[Citation],
        Field(description="generative: what the answer rests on, in the passage's order."),
    ] = field(default_factory=list)
    explanation: Annotated[
        Explanation | None, Field(description="Why, where it was asked for; else null.")
    ] = None
    warnings: Annotated[
        list[WarningView], Field(description="What is unusual about question or passage.")
    ] = field(default_factory=list)


_QA_REQUEST: TypeAdapter[QaRequest] = TypeAdapter(QaRequest)


def parse_request(data: Any, settings: GatewaySettings, pointer: str = "") -> QaRequest:
    """Validates one request; `pointer` is where it stands in the body.

    Raises `GatewayError` (invalid-request) naming each fault and its place.
    """
    try:
        request: QaRequest = _QA_REQUEST.validator.validate_python(data)
    except ValidationError as error:
        raise invalid(field_errors(error, pointer)) from None
    faults = []
    if len(request.question) > (most := settings.max_question_characters):
        faults.append(FieldError(f"{pointer}/question", f"must have at most {most} characters"))
    if len(request.context) > (most := settings.max_context_characters):
        faults.append(FieldError(f"{pointer}/context", f"must have at most {most} characters"))
    if request.explain and (wrong := not_explained(request.mode, in_batch=bool(pointer))):
        faults.append(FieldError(f"{pointer}/explain", wrong))
    if faults:
        raise invalid(faults)
    return request


def not_explained(mode: str, *, in_batch: bool) -> str:
    """Why an answer cannot be explained; empty where it can."""
    if mode == "generative":
        return "only answers of mode extractive are explained"
    if in_batch:
        return "answers of a batch are not explained; ask this question by itself"
    return ""


_NOT_LOADED = {
    "extractive": 'no model that finds spans is loaded: ask with "mode": "generative"',
    "generative": "no model that writes text is loaded: leave it out, or set "
    "MIAOTUI_GATEWAY_GENERATOR_TOKENIZER and _SHARD",
}


def no_model_for(mode: Literal["extractive", "generative"]) -> GatewayError:
    """The error for a question in a mode that no loaded model answers in."""
    return invalid([FieldError("/mode", _NOT_LOADED[mode])])


def invalid(faults: list[FieldError]) -> GatewayError:
    """The error for a request with these faults."""
    count = f"{len(faults)} places" if len(faults) > 1 else "one place"
    return GatewayError("invalid-request", f"The request is not valid in {count}.", faults)


def field_errors(
    error: ValidationError, pointer: str = "", model: type[BaseModel] = QaRequest
) -> list[FieldError]:
    """pydantic's findings without the values, and without names that the caller chose."""
    allowed = ", ".join(model.model_fields)
    faults: dict[FieldError, None] = {}
    for found in error.errors(include_url=False, include_context=False, include_input=False):
        kind, message, place = found["type"], found["msg"], found["loc"]
        if kind == "extra_forbidden":
            place, message = place[:-1], f"unknown field; allowed are: {allowed}"
        elif kind == "missing":
            message = "this field is required"
        elif kind == "model_type":
            message = "must be a JSON object"
        elif kind == "string_too_short":
            message = "must not be empty or blank"
        elif kind == "string_unicode":
            message = "must be valid Unicode, without lone surrogates"
        else:
            message = message.replace("Input should be", "must be")
        faults[FieldError(pointer + "".join(f"/{part}" for part in place), message)] = None
    return list(faults)
