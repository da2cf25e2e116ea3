"""What goes in and comes out at the documents' endpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from gateway.errors import FieldError
from gateway.explanation import Explanation, WarningView
from gateway.schema import (
    DEFAULT_ANSWER_LENGTH,
    DEFAULT_TOP_K,
    AnswerLength,
    CacheStatus,
    End,
    Hop,
    NoCache,
    Normalization,
    Start,
    Text,
    TopK,
    field_errors,
    invalid,
    not_explained,
)
from gateway.settings import GatewaySettings
from miaotui.retrieval.collection import Outcome
from miaotui.retrieval.library import DEFAULT_COLLECTION

DEFAULT_PASSAGES = 5
MOST_PASSAGES = 50
Dense: TypeAlias = Literal["used", "no-vectors", "language", "away", "off"]
_DENSE = (
    "Whether the passages were also found by meaning. no-vectors: the collection has none yet; "
    "language: the encoder does not know the question's; away: the encoder's stages did not "
    "answer; off: there is no encoder."
)
COLLECTION = Field(DEFAULT_COLLECTION, description="The collection's name.")
DocumentId = Annotated[str, Field(description="The document's id.")]
Page = Annotated[int | None, Field(description="Page, from 1, where the document has pages.")]
Heading = Annotated[str, Field(description="Headings above it, outermost first; may be empty.")]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class AddTextRequest(_Body):
    """A text to be added to a collection."""

    text: Text = Field(description="The document. Offsets in answers are offsets in it.")
    source: str = Field(
        "",
        max_length=1024,
        description="Where it comes from, such as a path or URL. A later text of the same source "
        "replaces it. Empty: each text is a document of its own.",
    )
    title: str = Field("", max_length=1024, description="Its title.")
    collection: str = COLLECTION


class SearchRequest(_Body):
    """A search for passages."""

    query: Text = Field(description="A question, or words.")
    collection: str = COLLECTION
    limit: int = Field(10, ge=1, le=MOST_PASSAGES, description="Passages to return, best first.")


class CollectionQuestion(_Body):
    """A question over a collection: as a QaRequest, without `context`."""

    question: Text = Field(description="The question.")
    collection: str = COLLECTION
    passages: int = Field(
        DEFAULT_PASSAGES,
        ge=1,
        le=MOST_PASSAGES,
        description="Passages to read, the best found. More find more, and take longer.",
    )
    top_k: TopK = DEFAULT_TOP_K
    max_answer_length: AnswerLength = DEFAULT_ANSWER_LENGTH
    no_answer_threshold: float | None = Field(
        None,
        allow_inf_nan=False,
        description='"No answer" is returned where `no_answer_score` is above this; null: what '
        "the model was calibrated to.",
    )
    normalization: Normalization = "nfc"
    no_cache: NoCache = False
    mode: Literal["extractive", "generative"] = Field(
        "extractive",
        description="extractive: the documents' own words; generative: a full sentence with "
        "citations, which needs a model that writes.",
    )
    explain: bool = Field(False, description="Explain the answer: takes seconds; extractive only.")


@dataclass(frozen=True, slots=True)
class DocumentView:
    """A document."""

    id: Annotated[str, Field(description="The same for all versions from one source.")]
    source: Annotated[str, Field(description="Where it comes from: a path, URL or name.")]
    title: str
    sha256: Annotated[str, Field(description="Of the file or text as it was sent.")]
    bytes: int
    characters: Annotated[int, Field(description="Length of its text.")]
    passages: Annotated[int, Field(description="Passages that it was cut into.")]
    added_at: Annotated[str, Field(description="When this version was added, in UTC.")]


@dataclass(frozen=True, slots=True)
class DocumentDetail(DocumentView):
    """A document with its text."""

    text: Annotated[str, Field(description="Its text, which all offsets are about.")]


@dataclass(frozen=True, slots=True)
class DocumentList:
    """Documents by source."""

    collection: str
    documents: list[DocumentView]
    next: Annotated[
        str | None,
        Field(description="Pass it as `after` for the next page; null: this is the last."),
    ]


@dataclass(frozen=True, slots=True)
class AddedView:
    """A document that is in the collection now."""

    id: str
    source: str
    outcome: Annotated[
        Outcome,
        Field(description="added; replaced: an older version; unchanged: it was there already."),
    ]


@dataclass(frozen=True, slots=True)
class SkippedView:
    """A file that could not be taken."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class AddResponse:
    """What became of each document."""

    collection: str
    documents: list[AddedView]
    skipped: list[SkippedView]


@dataclass(frozen=True, slots=True)
class CollectionView:
    """A collection and what it holds."""

    name: str
    documents: int
    passages: int
    vectors: Annotated[
        int, Field(description="Passages that are also found by meaning, not only by words.")
    ]
    waiting: Annotated[
        int,
        Field(
            description="Passages that have no vector yet, and get theirs from the encoder in the "
            "background. Those in Chinese get none."
        ),
    ]


@dataclass(frozen=True, slots=True)
class CollectionList:
    """All collections."""

    collections: list[CollectionView]
    encoder: Annotated[
        Literal["serving", "away", "none"],
        Field(
            description="What makes the vectors. away: they are made when it is back; none: there "
            "is none, and documents are found by their words only."
        ),
    ]


@dataclass(frozen=True, slots=True)
class Retrieval:
    """How a passage was found; ranks from 1, null where a retriever did not find it."""

    rank: int
    score: Annotated[float, Field(description="Both retrievers' scores, fused.")]
    lexical_rank: int | None
    lexical_score: Annotated[float | None, Field(description="BM25.")]
    dense_rank: int | None
    dense_score: Annotated[float | None, Field(description="Cosine.")]


@dataclass(frozen=True, slots=True)
class PassageView:
    """A passage of a document: characters `start` to `end` of its text."""

    document: DocumentId
    source: str
    title: str
    page: Page
    heading: Heading
    start: Start
    end: End
    text: str
    retrieval: Retrieval


@dataclass(frozen=True, slots=True)
class SearchResponse:
    """Passages, best first."""

    collection: str
    passages: list[PassageView]
    milliseconds: float
    dense: Annotated[Dense, Field(description=_DENSE)]


@dataclass(frozen=True, slots=True)
class SourcedAnswer:
    """A candidate answer and where it stands; offsets in the document's text."""

    text: str
    start: Start
    end: End
    score: Annotated[float, Field(description="Probability of being right, among what was read.")]
    logit: Annotated[float, Field(description="Start logit plus end logit.")]
    document: DocumentId
    source: str
    title: str
    page: Page
    heading: Heading
    passage: Annotated[int, Field(ge=0, description="Index in `passages`.")]


@dataclass(frozen=True, slots=True)
class SourcedCitation:
    """A part of a document that a generated answer rests on; offsets in its text."""

    text: str
    start: int
    end: int
    document: DocumentId
    source: str
    title: str
    page: int | None
    heading: str
    passage: Annotated[int, Field(ge=0, description="Index in `passages`.")]


@dataclass(frozen=True, slots=True)
class SourcedExplanation(Explanation):
    """Why an answer is the answer; offsets count within the text of its passage."""

    passage: Annotated[int, Field(description="Index in `passages` of the answer's.")]
    retrieval: Annotated[Retrieval, Field(description="Why this passage was read.")]


@dataclass(frozen=True, slots=True)
class CollectionAnswer:
    """The answer to a question over a collection."""

    answerable: Annotated[bool, Field(description="Whether the documents hold an answer.")]
    answers: Annotated[
        list[SourcedAnswer],
        Field(description="Best first; empty where not answerable and top_k is 1."),
    ]
    no_answer_score: Annotated[
        float, Field(description='Logit of "no answer" minus the best span\'s, where it stands.')
    ]
    collection: str
    passages: Annotated[list[PassageView], Field(description="What was read, best first.")]
    model: str
    model_fingerprint: str
    cache: Annotated[CacheStatus, Field(description="hit: all of it was read before.")]
    timings: Annotated[list[Hop], Field(description="Where the time went.")]
    trace_id: str
    request_id: str
    answer: Annotated[
        str | None, Field(description="generative: the answer in a sentence; else null.")
    ] = None
    citations: Annotated[
        list[SourcedCitation], Field(description="generative: what the answer rests on.")
    ] = field(default_factory=list)
    explanation: Annotated[
        SourcedExplanation | None,
        Field(description="Why, where it was asked for and anything was found; else null."),
    ] = None
    warnings: Annotated[
        list[WarningView], Field(description="What is unusual about the question.")
    ] = field(default_factory=list)
    dense: Annotated[Dense, Field(description=_DENSE)] = "used"


ADD_RESPONSE: TypeAdapter[AddResponse] = TypeAdapter(AddResponse)
DOCUMENT_LIST: TypeAdapter[DocumentList] = TypeAdapter(DocumentList)
DOCUMENT_DETAIL: TypeAdapter[DocumentDetail] = TypeAdapter(DocumentDetail)
COLLECTION_LIST: TypeAdapter[CollectionList] = TypeAdapter(CollectionList)
SEARCH_RESPONSE: TypeAdapter[SearchResponse] = TypeAdapter(SearchResponse)
COLLECTION_ANSWER: TypeAdapter[CollectionAnswer] = TypeAdapter(CollectionAnswer)

B = TypeVar("B", bound=_Body)


def parse(body: type[B], data: Any, settings: GatewaySettings) -> B:
    """Validates a body. Raises `GatewayError` (invalid-request) naming each fault's place."""
    try:
        parsed = body.model_validate(data)
    except ValidationError as error:
        raise invalid(field_errors(error, model=body)) from None
    limits = {
        "question": settings.max_question_characters,
        "query": settings.max_question_characters,
        "text": settings.max_document_characters,
    }
    faults = [
        FieldError(f"/{name}", f"must have at most {limit} characters")
        for name, limit in limits.items()
        if len(getattr(parsed, name, "")) > limit
    ]
    if (
        isinstance(parsed, CollectionQuestion)
        and parsed.explain
        and (wrong := not_explained(parsed.mode, in_batch=False))
    ):
        faults.append(FieldError("/explain", wrong))
    if faults:
        raise invalid(faults)
    return parsed
