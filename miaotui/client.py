"""Asks a Miaotui gateway over HTTP, blocking (`Client`) or not (`AsyncClient`).

with Client("http://127.0.0.1:8080") as client:
    answer = client.ask("When?", "It was in 1925.")
    print(answer.text, answer.start, answer.end)
    for piece in client.chat([{"role": "user", "content": "Hello!"}]):
        print(piece, end="")
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import httpx

from miaotui.questions import Answer, Candidate, Citation, InputWarning, Question
from miaotui.streaming import (
    AsyncClosedOnExit,
    AsyncTextStream,
    ClosedOnExit,
    MiaotuiError,
    TextStream,
    read_error,
)

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncTextStream",
    "Candidate",
    "Citation",
    "Client",
    "InputWarning",
    "MiaotuiError",
    "Question",
    "TextStream",
]

DEFAULT_URL = "http://127.0.0.1:8080"
# Holds the API key where none is given.
KEY_VARIABLE = "MIAOTUI_KEY"
DEFAULT_TIMEOUT_SECONDS = 10.0
DEFAULT_WRITING_SECONDS = 120.0
# What the network may take beside the time that the gateway has.
_NETWORK_SECONDS = 5.0


_HttpT = TypeVar("_HttpT")


class _Requests(Generic[_HttpT]):
    """What both clients share: how to ask, and how to read replies."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        key: str | None = None,
    ) -> None:
        """`timeout`: seconds that an answer may take (for `ask_many`, each of them).

        `key`: an API key; `None`: the one in the environment variable MIAOTUI_KEY, if any.
        """
        self._url = url.rstrip("/")
        key = os.environ.get(KEY_VARIABLE, "") if key is None else key
        headers = {"X-Request-Timeout": f"{timeout:g}"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self._http = self._connect(
            base_url=self._url,
            timeout=timeout + _NETWORK_SECONDS,
            # A proxy of the environment must not come between: the gateway is named outright.
            trust_env=False,
            headers=headers,
        )

    def _connect(self, **options: Any) -> _HttpT:
        """The connections."""
        raise NotImplementedError

    @staticmethod
    def _batch(questions: Sequence[Question]) -> dict[str, Any]:
        return {"requests": [question.body() for question in questions]}

    @staticmethod
    def _prompt(prompt: str | Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": None, **options}

    @staticmethod
    def _messages(
        messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {"messages": [dict(message) for message in messages], **options}

    @staticmethod
    def _writing(body: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The arguments of a request for streamed text."""
        return {
            "json": {**body, "stream": True, "stream_options": {"include_usage": True}},
            "headers": {"X-Request-Timeout": f"{seconds:g}"},
            "timeout": seconds + _NETWORK_SECONDS,
        }

    @staticmethod
    def _sound(
        data: bytes, seconds: float, translate: bool, fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The arguments of a request for a transcript."""
        return {
            "url": f"/v1/audio/{'translations' if translate else 'transcriptions'}",
            "files": {"file": ("sound", data)},
            "data": {name: value for name, value in fields.items() if value is not None},
            "headers": {"X-Request-Timeout": f"{seconds:g}"},
            "timeout": seconds + _NETWORK_SECONDS,
        }

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turns a broken connection into `MiaotuiError`."""
        try:
            yield
        except httpx.TransportError as error:
            raise MiaotuiError(
                f"cannot reach a gateway at {self._url} ({type(error).__name__})"
            ) from error


def _answer(body: Mapping[str, Any]) -> Answer:
    return Answer(
        answerable=body["answerable"],
        candidates=tuple(Candidate(**candidate) for candidate in body["answers"]),
        no_answer_score=body["no_answer_score"],
        model=body["model"],
        model_fingerprint=body["model_fingerprint"],
        cache=body["cache"],
        timings={hop["hop"]: hop["milliseconds"] for hop in body["timings"]},
        trace_id=body["trace_id"],
        request_id=body["request_id"],
        sentence=body.get("answer") or "",
        citations=tuple(Citation(**citation) for citation in body.get("citations", ())),
        explanation=body.get("explanation"),
        warnings=tuple(InputWarning(**warning) for warning in body.get("warnings", ())),
    )


def _problem(problem: Mapping[str, Any], status: int) -> MiaotuiError:
    faults = "; ".join(f"{e['pointer'] or '/'}: {e['detail']}" for e in problem.get("errors", ()))
    message = f"{problem.get('title', 'no answer')}: {problem.get('detail', '')} {faults}".strip()
    return MiaotuiError(message, status, problem)


def _read(response: httpx.Response) -> Any:
    """The JSON of a reply that was read; raises `MiaotuiError` for a problem."""
    try:
        body = response.json()
    except ValueError:
        raise MiaotuiError(
            f"{response.url} does not answer as a gateway", response.status_code
        ) from None
    if response.status_code != 200:
        raise _problem(body if isinstance(body, dict) else {}, response.status_code)
    return body


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _transcript(response: httpx.Response) -> Any:
    """What was written down: JSON as an object, all else as text. Raises `MiaotuiError`."""
    if response.status_code != 200:
        raise read_error(_json(response), response.status_code)
    if response.headers.get("content-type", "").startswith("application/json"):
        return response.json()
    return response.text


def _line(line: str) -> tuple[int, Answer | MiaotuiError]:
    body = json.loads(line)
    if "error" in body:
        return body["index"], _problem(body["error"], body["error"]["status"])
    return body["index"], _answer(body["response"])


class Client(_Requests[httpx.Client], ClosedOnExit):
    """Blocks while it waits. Use as a context manager, or call `close`."""

    def _connect(self, **options: Any) -> httpx.Client:
        return httpx.Client(**options)

    def ask(self, question: str, context: str, **options: Any) -> Answer:
        """Answers a question; `options` as in `Question`. Raises `MiaotuiError`."""
        with self._reaching():
            body = Question(question, context, **options).body()
            return _answer(_read(self._http.post("/v1/qa", json=body)))

    def ask_many(
        self, questions: Sequence[Question]
    ) -> Iterator[tuple[int, Answer | MiaotuiError]]:
        """Yields (index, outcome) as each is done. Raises `MiaotuiError` where none can be."""
        body = self._batch(questions)
        with (
            self._reaching(),
            self._http.stream("POST", "/v1/qa/batch", json=body) as response,
        ):
            if response.status_code != 200:
                response.read()
                _read(response)
            for line in response.iter_lines():
                yield _line(line)

    def write(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float = DEFAULT_WRITING_SECONDS,
        **options: Any,
    ) -> TextStream:
        """Continues a prompt, a text or token ids; yields pieces as they are written.

        `timeout` in seconds, of the whole text; `options` as of /v1/completions. Raises
        `MiaotuiError`, as does reading the stream.
        """
        return self._stream("/v1/completions", self._prompt(prompt, options), timeout)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        timeout: float = DEFAULT_WRITING_SECONDS,
        **options: Any,
    ) -> TextStream:
        """Writes a chat's next message; else as `write`, with options of /v1/chat/completions."""
        return self._stream("/v1/chat/completions", self._messages(messages, options), timeout)

    def _stream(self, path: str, body: dict[str, Any], seconds: float) -> TextStream:
        request = self._http.build_request("POST", path, **self._writing(body, seconds))
        with self._reaching():
            response = self._http.send(request, stream=True)
            if response.status_code != 200:
                response.read()
                raise read_error(_json(response), response.status_code)
        return TextStream(response)

    def transcribe(
        self,
        sound: bytes,
        *,
        timeout: float = DEFAULT_WRITING_SECONDS,
        translate: bool = False,
        **fields: Any,
    ) -> Any:
        """Writes down what is said in a sound file; `fields` as of /v1/audio/transcriptions.

        `translate`: in English. The reply's JSON, or its text where `response_format` is "text",
        "srt" or "vtt". `timeout` in seconds. Raises `MiaotuiError`.
        """
        with self._reaching():
            request = self._sound(sound, timeout, translate, fields)
            return _transcript(self._http.post(**request))

    def models(self) -> list[dict[str, Any]]:
        """The models served. Raises `MiaotuiError`."""
        with self._reaching():
            models: list[dict[str, Any]] = _read(self._http.get("/v1/models"))["models"]
            return models

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()


class AsyncClient(_Requests[httpx.AsyncClient], AsyncClosedOnExit):
    """The same for asyncio. Use as an async context manager, or call `close`."""

    def _connect(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(**options)

    async def ask(self, question: str, context: str, **options: Any) -> Answer:
        """Answers a question; `options` as in `Question`. Raises `MiaotuiError`."""
        with self._reaching():
            body = Question(question, context, **options).body()
            return _answer(_read(await self._http.post("/v1/qa", json=body)))

    async def ask_many(
        self, questions: Sequence[Question]
    ) -> AsyncIterator[tuple[int, Answer | MiaotuiError]]:
        """Yields (index, outcome) as each is done. Raises `MiaotuiError` where none can be."""
        body = self._batch(questions)
        with self._reaching():
            async with self._http.stream("POST", "/v1/qa/batch", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    _read(response)
                async for line in response.aiter_lines():
                    yield _line(line)

    async def write(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float = DEFAULT_WRITING_SECONDS,
        **options: Any,
    ) -> AsyncTextStream:
        """As `Client.write`."""
        return await self._stream("/v1/completions", self._prompt(prompt, options), timeout)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        timeout: float = DEFAULT_WRITING_SECONDS,
        **options: Any,
    ) -> AsyncTextStream:
        """As `Client.chat`."""
        body = self._messages(messages, options)
        return await self._stream("/v1/chat/completions", body, timeout)

    async def _stream(self, path: str, body: dict[str, Any], seconds: float) -> AsyncTextStream:
        request = self._http.build_request("POST", path, **self._writing(body, seconds))
        with self._reaching():
            response = await self._http.send(request, stream=True)
            if response.status_code != 200:
                await response.aread()
                raise read_error(_json(response), response.status_code)
        return AsyncTextStream(response)

    async def transcribe(
        self,
        sound: bytes,
        *,
        timeout: float = DEFAULT_WRITING_SECONDS,
        translate: bool = False,
        **fields: Any,
    ) -> Any:
        """As `Client.transcribe`."""
        with self._reaching():
            request = self._sound(sound, timeout, translate, fields)
            return _transcript(await self._http.post(**request))

    async def models(self) -> list[dict[str, Any]]:
        """The models served. Raises `MiaotuiError`."""
        with self._reaching():
            models: list[dict[str, Any]] = _read(await self._http.get("/v1/models"))["models"]
            return models

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()
