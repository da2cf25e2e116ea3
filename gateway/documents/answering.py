"""A question over a collection: retrieve, read the best passages in one batch, cite."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TypedDict

from gateway.documents.schema import (
    CollectionAnswer,
    CollectionQuestion,
    Dense,
    PassageView,
    Retrieval,
    SourcedAnswer,
    SourcedCitation,
    SourcedExplanation,
)
from gateway.documents.service import Documents, Searched
from gateway.errors import FieldError, GatewayError
from gateway.explaining import ExplanationDesk
from gateway.generation.answering import Answerer
from gateway.input_warnings import warnings_about
from gateway.pipeline import Clock, Pipeline
from gateway.schema import CacheStatus, Hop, QaRequest, invalid, no_model_for
from gateway.served import Served
from gateway.settings import GatewaySettings
from miaotui.retrieval.answers import (
    RankedSpan,
    SpanReading,
    is_answer,
    language_of,
    rank_spans,
)
from miaotui.retrieval.collection import Collection, Found
from miaotui.retrieval.reading.document import heading_at, page_at
from miaotui.retrieval.stored import StoredPassage
from miaotui.telemetry import current_trace_id

_SEPARATOR = "\n\n"
_HOW: dict[Dense, str] = {
    "used": "by their words and by their meaning",
    "no-vectors": "by their words only: the collection has no vectors yet",
    "language": "by their words only: the encoder does not know the question's language",
    "away": "by their words only: the encoder's stages did not answer",
    "off": "by their words only: there is no encoder",
}


class CollectionAnswerer:
    """Answers from collections, in either mode; `pipeline` or `writer` may be missing."""

    def __init__(
        self,
        settings: GatewaySettings,
        documents: Documents,
        pipeline: Pipeline | None,
        writer: Answerer | None,
        explaining: ExplanationDesk | None = None,
    ) -> None:
        self._explaining = explaining
        self._settings = settings
        self._documents = documents
        self._pipeline = pipeline
        self._writer = writer

    async def answer(
        self, question: CollectionQuestion, request_id: str, timeout: float | None
    ) -> CollectionAnswer:
        """Answers within `timeout` seconds; None: the mode's default. Raises `GatewayError`."""
        clock = Clock()
        collection = await self._documents.collection(question.collection)
        if collection is None:
            if "collection" not in question.model_fields_set:
                detail = "this field is required: there are no documents to answer from instead"
                raise invalid([FieldError("/context", detail)])
            raise GatewayError("not-found", "There is no such collection.")
        if question.mode == "generative":
            seconds = self._settings.generation_timeout if timeout is None else timeout
            return await self._written(question, collection, request_id, seconds, clock)
        usual = self._settings.request_timeout
        if question.explain:
            usual = self._settings.max_request_timeout
        seconds = usual if timeout is None else timeout
        return await self._extracted(question, collection, request_id, seconds, clock)

    async def _found(
        self, question: CollectionQuestion, collection: Collection, seconds: float, clock: Clock
    ) -> Searched:
        try:
            async with asyncio.timeout(seconds):
                work = self._documents.search(collection, question.question, question.passages)
                return await clock.timed("retrieval", work)
        except TimeoutError:
            raise GatewayError("timeout", f"No answer within {seconds:g} s.") from None

    async def _extracted(
        self,
        question: CollectionQuestion,
        collection: Collection,
        request_id: str,
        seconds: float,
        clock: Clock,
    ) -> CollectionAnswer:
        if self._pipeline is None:
            raise no_model_for("extractive")
        served = await self._pipeline.served(seconds - clock.elapsed())
        left = _left(seconds, clock)
        searched = await self._found(question, collection, left, clock)
        found = searched.found
        if not found:
            return _nothing(question, served, request_id, clock, searched.dense)
        requests = [
            QaRequest.model_construct(
                question=question.question,
                context=passage.passage.text,
                top_k=question.top_k,
                max_answer_length=question.max_answer_length,
                normalization=question.normalization,
                no_cache=question.no_cache,
            )
            for passage in found
        ]
        left = _left(seconds, clock)
        readings = await self._pipeline.read_passages(requests, request_id, left, clock)
        spans = [
            SpanReading(
                place,
                span.start,
                span.end,
                span.logit,
                span.score,
                # Of the passage's best span, "no answer" stands this much above it.
                stored.no_answer_score + stored.spans[0].logit,
            )
            for place, stored in enumerate(readings.answers)
            for span in stored.spans
        ]
        ranked = rank_spans(spans, [passage.ranked for passage in found])
        thresholds = dict(readings.served.no_answer_thresholds)
        language = language_of(question.question)
        threshold = question.no_answer_threshold
        if threshold is None:
            threshold = thresholds.get(language, 0.0)
        answerable = bool(ranked) and is_answer(
            ranked[0].reading, found[ranked[0].reading.passage].ranked, threshold, language
        )
        shown = ranked[: question.top_k] if answerable or question.top_k > 1 else []
        best = ranked[0].reading if ranked else None
        explanation = None
        if question.explain and best is not None:
            left = _left(seconds, clock)
            explanation = await self._explained(
                requests[best.passage],
                (searched, best.passage),
                (readings.cache, clock.result(), answerable),
                request_id,
                left,
            )
        return CollectionAnswer(
            answerable=answerable,
            answers=[_answer(span, found) for span in shown],
            no_answer_score=best.no_answer_logit - best.logit if best else 0.0,
            collection=question.collection,
            passages=passage_views(found),
            model=readings.served.name,
            model_fingerprint=readings.served.fingerprint,
            cache=readings.cache,
            timings=clock.result(),
            trace_id=current_trace_id(),
            request_id=request_id,
            explanation=explanation,
            warnings=warnings_about(question.question, "", 0.0, readings.served),
            dense=searched.dense,
        )

    async def _explained(
        self,
        request: QaRequest,
        place: tuple[Searched, int],
        answered: tuple[CacheStatus, list[Hop], bool],
        request_id: str,
        seconds: float,
    ) -> SourcedExplanation | None:
        """Why the passage that the answer stands in was read, and what in it the answer rests on.

        `place`: what was found, and the answer's index in it; `answered`: whence, in what time,
        and whether there is an answer.
        """
        if self._explaining is None:
            return None
        searched, passage = place
        cache, timings, answerable = answered
        explanation = await self._explaining.explain(
            request, request_id, seconds, cache=cache, timings=timings, answerable=answerable
        )
        known = {each.name: getattr(explanation, each.name) for each in fields(explanation)}
        known["path"] = [
            replace(step, did=f"{step.did}, {_HOW[searched.dense]}")
            if step.hop == "retrieval"
            else step
            for step in explanation.path
        ]
        retrieval = passage_views(searched.found)[passage].retrieval
        return SourcedExplanation(**known, passage=passage, retrieval=retrieval)

    async def _written(
        self,
        question: CollectionQuestion,
        collection: Collection,
        request_id: str,
        seconds: float,
        clock: Clock,
    ) -> CollectionAnswer:
        if self._writer is None:
            raise no_model_for("generative")
        served = await self._writer.served(seconds - clock.elapsed())
        left = _left(seconds, clock)
        searched = await self._found(question, collection, left, clock)
        found = searched.found
        if not found:
            return _nothing(question, served, request_id, clock, searched.dense)
        context = _SEPARATOR.join(passage.passage.text for passage in found)
        more = {}
        if "max_answer_length" in question.model_fields_set:
            more["max_answer_length"] = question.max_answer_length
        request = QaRequest.model_construct(
            {"question", "context", "mode", *more},
            question=question.question,
            context=context,
            mode="generative",
            no_cache=question.no_cache,
            **more,
        )
        left = _left(seconds, clock)
        written = await self._writer.answer(request, request_id, left)
        for hop in written.timings:
            if hop.hop != "total":
                clock.add(hop.hop, hop.milliseconds / 1000)
        return CollectionAnswer(
            answerable=written.answerable,
            answers=[],
            no_answer_score=0.0,
            collection=question.collection,
            passages=passage_views(found),
            model=written.model,
            model_fingerprint=written.model_fingerprint,
            cache=written.cache,
            timings=clock.result(),
            trace_id=current_trace_id(),
            request_id=request_id,
            answer=written.answer,
            citations=[
                citation
                for range_ in written.citations
                for citation in _citations(range_.start, range_.end, found)
            ],
            dense=searched.dense,
        )


def _left(seconds: float, clock: Clock) -> float:
    """What is left of `seconds`; never nothing, so that what comes next says that it is late."""
    return max(0.001, seconds - clock.elapsed())


def _nothing(
    question: CollectionQuestion, served: Served, request_id: str, clock: Clock, dense: Dense
) -> CollectionAnswer:
    """The answer where the collection holds nothing that has to do with the question."""
    return CollectionAnswer(
        answerable=False,
        answers=[],
        no_answer_score=0.0,
        collection=question.collection,
        passages=[],
        model=served.name,
        model_fingerprint=served.fingerprint,
        cache=CacheStatus.BYPASS,
        timings=clock.result(),
        trace_id=current_trace_id(),
        request_id=request_id,
        dense=dense,
    )


def passage_views(found: Sequence[Found]) -> list[PassageView]:
    """The passages as the API gives them."""
    views = []
    for rank, one in enumerate(found, start=1):
        passage, ranked = one.passage, one.ranked
        views.append(
            PassageView(
                **_place(passage, passage.start),
                start=passage.start,
                end=passage.end,
                text=passage.text,
                retrieval=Retrieval(
                    rank,
                    ranked.score,
                    ranked.lexical_rank,
                    ranked.lexical_score,
                    ranked.dense_rank,
                    ranked.dense_score,
                ),
            )
        )
    return views


class _Place(TypedDict):
    """Of which document something is, and where in it."""

    document: str
    source: str
    title: str
    page: int | None
    heading: str


def _place(passage: StoredPassage, start: int) -> _Place:
    """`start`: a character of the document's text that the passage holds."""
    document, marks = passage.document, passage.marks
    return _Place(
        document=document.id,
        source=document.source,
        title=document.title,
        page=page_at(marks.pages, start),
        heading=heading_at(marks.headings, start),
    )


def _answer(span: RankedSpan, found: Sequence[Found]) -> SourcedAnswer:
    reading = span.reading
    passage = found[reading.passage].passage
    start = passage.start + reading.start
    return SourcedAnswer(
        text=passage.text[reading.start : reading.end],
        start=start,
        end=passage.start + reading.end,
        score=span.score,
        logit=reading.logit,
        **_place(passage, start),
        passage=reading.passage,
    )


def _citations(start: int, end: int, found: Sequence[Found]) -> list[SourcedCitation]:
    """A range of the passages joined, as ranges of the documents that they are of."""
    cited = []
    begin = 0
    for place, one in enumerate(found):
        passage = one.passage
        first, last = max(start, begin), min(end, begin + len(passage.text))
        if first < last:
            within = passage.start + first - begin
            cited.append(
                SourcedCitation(
                    text=passage.text[first - begin : last - begin],
                    start=within,
                    end=within + last - first,
                    **_place(passage, within),
                    passage=place,
                )
            )
        begin += len(passage.text) + len(_SEPARATOR)
    return cited
