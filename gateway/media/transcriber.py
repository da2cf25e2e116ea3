"""Speech to text: windows of sound, the language of the first one, and a text for each."""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from gateway.calling import time_left
from gateway.errors import FieldError, GatewayError
from gateway.generation.generator import Generator
from gateway.generation.request import GenerationRequest, Sampling, Token, Usage
from gateway.media.reading import media_of, read_file
from gateway.schema import invalid
from gateway.served import Served
from gateway.slots import Slots
from miaotui.media.languages import Language
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb

# Windows of a file written down at once: they share batches.
WINDOWS_AT_ONCE = 4
# More than logits differ by: leaves the languages' order among themselves.
_LANGUAGES_ONLY = 1000.0
_ENGLISH = Language("en", "english", -1)


@dataclass(frozen=True, slots=True)
class Speech:
    """A recording and how it is to be written down."""

    data: bytes
    language: str = ""
    """A code or an English name; empty: found out from the first window."""
    translate: bool = False
    previous: str = ""
    """A text in whose spelling and style it goes on."""
    temperature: float = 0.0
    confidence: bool = False
    """Whether segments tell how sure the model is."""


@dataclass(frozen=True, slots=True)
class Segment:
    """What is said in a window; times in seconds from the recording's beginning."""

    start: float
    end: float
    text: str
    average_logprob: float | None = None
    compression: float = 0.0
    """Bytes of the text by its compressed bytes: high where it repeats itself."""


@dataclass(slots=True)
class Transcript:
    """All that is said. `language`: a name in English, such as "chinese"."""

    language: str
    segments: list[Segment] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)

    @property
    def text(self) -> str:
        """The segments' texts."""
        return joined([segment.text for segment in self.segments])

    @property
    def seconds(self) -> float:
        """How long the recording is."""
        return self.segments[-1].end if self.segments else 0.0


@dataclass(frozen=True, slots=True)
class _Job:
    speech: Speech
    served: Served
    request_id: str
    deadline: float


class Transcriber:
    """Writes recordings down."""

    def __init__(self, generator: Generator, slots: Slots) -> None:
        """`slots`: recordings worked on at once; each is held in memory."""
        self._generator = generator
        self._slots = slots

    @property
    def generator(self) -> Generator:
        """What writes."""
        return self._generator

    async def transcribe(self, speech: Speech, request_id: str, timeout: float) -> Transcript:
        """Writes a recording down within `timeout` seconds.

        Raises `GatewayError`; cancelling ends the work.
        """
        transcript: Transcript | None = None
        try:
            async with (
                asyncio.timeout(timeout),
                aclosing(self._told(speech, request_id, timeout, at_once=WINDOWS_AT_ONCE)) as news,
            ):
                async for told in news:
                    transcript = told
        except TimeoutError:
            raise GatewayError("timeout", f"No text within {timeout:g} s.") from None
        if transcript is None:
            raise GatewayError("service-failed", "The tokenizer made nothing of the sound.")
        return transcript

    async def stream(
        self, speech: Speech, request_id: str, timeout: float
    ) -> AsyncGenerator[tuple[str, Transcript]]:
        """The text bit by bit, with the transcript of the windows that are complete.

        Raises `GatewayError`; closing the generator ends the work.
        """
        written = ""
        async with aclosing(self._told(speech, request_id, timeout, at_once=1)) as news:
            async for transcript in news:
                text = transcript.text
                yield text[len(written) :], transcript
                written = text

    async def _told(
        self, speech: Speech, request_id: str, timeout: float, *, at_once: int
    ) -> AsyncGenerator[Transcript]:
        """The transcript, again and again, with a segment more each time."""
        deadline = asyncio.get_running_loop().time() + timeout
        with self._slots.one(self._generator.refused):
            served = await self._generator.served(timeout)
            language = _chosen(speech, media_of(served).languages)
            windows = read_file(
                self._generator.pair, served, speech.data, request_id, deadline, "/file"
            )
            running: deque[asyncio.Task[tuple[Segment, Usage]]] = deque()
            transcript: Transcript | None = None
            async with aclosing(windows):
                try:
                    number = 0
                    async for window in windows:
                        job = _Job(speech, served, f"{request_id}.{number}", deadline)
                        language = language or await self._heard(job, window.features)
                        transcript = transcript or Transcript(language.name)
                        number += 1
                        writing = self._write(job, language, window)
                        running.append(asyncio.create_task(writing))
                        while len(running) >= at_once:
                            await _take(running, transcript)
                            yield transcript
                    while running and transcript is not None:
                        await _take(running, transcript)
                        yield transcript
                finally:
                    for task in running:
                        task.cancel()
                    await asyncio.gather(*running, return_exceptions=True)

    async def _heard(self, job: _Job, features: shard_pb.Features) -> Language:
        """The language of a window: the likeliest token after the beginning."""
        languages = media_of(job.served).languages
        request = GenerationRequest(
            prompt=tokenizer_pb.MediaPrompt(detect=True),
            sampling=Sampling(
                temperature=0.0,
                logprobs=0,
                logit_bias={one.token: _LANGUAGES_ONLY for one in languages},
            ),
            max_tokens=1,
            features=features,
        )
        news, _ = await self._generator.complete(
            request, f"{job.request_id}.language", time_left(job.deadline)
        )
        pieces = [token.chosen.piece for one in news for text in one.texts for token in text.tokens]
        for language in languages:
            if pieces == [f"<|{language.code}|>".encode()]:
                return language
        raise GatewayError("service-failed", "The shards named no language.")

    async def _write(
        self, job: _Job, language: Language, window: tokenizer_pb.ExtractFeaturesResponse
    ) -> tuple[Segment, Usage]:
        speech = job.speech
        several = bool(media_of(job.served).languages)
        request = GenerationRequest(
            prompt=tokenizer_pb.MediaPrompt(
                language=language.code if several else "",
                translate=speech.translate,
                previous=speech.previous,
            ),
            sampling=Sampling(
                temperature=speech.temperature, logprobs=0 if speech.confidence else None
            ),
            features=window.features,
        )
        left = time_left(job.deadline)
        news, _ = await self._generator.complete(request, job.request_id, left)
        text = "".join(part.text for one in news for part in one.texts).strip()
        tokens = [token for one in news for part in one.texts for token in part.tokens]
        usage = Usage()
        for one in news:
            usage.add(one.usage or Usage())
        segment = Segment(window.start_seconds, window.end_seconds, text)
        if speech.confidence:
            segment = replace(
                segment, average_logprob=_average(tokens), compression=_compression(text)
            )
        return segment, usage


async def _take(
    running: deque[asyncio.Task[tuple[Segment, Usage]]], transcript: Transcript
) -> None:
    segment, usage = await running[0]
    running.popleft()
    transcript.segments.append(segment)
    transcript.usage.add(usage)


def joined(texts: list[str]) -> str:
    """Texts of neighbouring windows as one; a space between, but not within Chinese or Japanese."""
    whole = ""
    for text in texts:
        if whole and text and not (_is_wide(whole[-1]) or _is_wide(text[0])):
            whole += " "
        whole += text
    return whole


def _is_wide(character: str) -> bool:
    return "\u2e80" <= character <= "\uabff" or "\uff00" <= character <= "\uffef"


def _chosen(speech: Speech, known: tuple[Language, ...]) -> Language | None:
    """The language asked for; None: it is to be found out. Raises `GatewayError`."""
    if not known:
        if speech.translate:
            raise invalid([FieldError("", "this model knows English only: nothing to translate")])
        if speech.language.lower() not in ("", _ENGLISH.code, _ENGLISH.name):
            raise invalid([FieldError("/language", "this model knows English only")])
        return _ENGLISH
    if not speech.language:
        return None
    wanted = speech.language.lower()
    for language in known:
        # "zh-CN" is "zh", whatever its region.
        if language.name == wanted or language.code == wanted.partition("-")[0]:
            return language
    codes = ", ".join(sorted(language.code for language in known))
    raise invalid([FieldError("/language", f"must be one of {codes}")])


def _average(tokens: list[Token]) -> float | None:
    if not tokens:
        return None
    return sum(token.chosen.logprob for token in tokens) / len(tokens)


def _compression(text: str) -> float:
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0
