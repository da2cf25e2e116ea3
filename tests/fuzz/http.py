"""Cases of the HTTP API: what its description allows or nearly allows, and what is no HTTP."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from tests.fuzz import files, pictures, sound, values
from tests.fuzz.cases import LATE, Entry, Finding
from tests.fuzz.wire import Connection, Reply

# A model that writes would otherwise write as much as it can for many of the cases.
_MOST_TOKENS = 6
_METHODS = ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "POST", "BREW", "get")
_TYPES = (
    *("text/plain", "application/xml", "", "application/json; charset=latin-1", "a" * 5_000),
    *("multipart/form-data", "application/x-www-form-urlencoded", "application/JSON;;;"),
)
_HEADERS: tuple[tuple[str, Callable[[random.Random], str]], ...] = (
    ("X-Request-Timeout", lambda c: c.choice(("1", "0", "-1", "nan", "1e400", "x", "0.001", "9"))),
    ("X-Request-ID", lambda c: c.choice(("abc-1", "a" * 129, "é", "a b", ""))),
    ("traceparent", lambda c: c.choice((f"00-{'1' * 32}-{'2' * 16}-00", "00-0-0-00", "zz", "-"))),
    ("tracestate", lambda c: c.choice(("a=1", "=", "," * 600, "a" * 4_000))),
    ("Accept", lambda c: c.choice(("text/event-stream", "*/*", "x", "application/x-ndjson"))),
    ("Authorization", lambda c: c.choice(("Bearer x", "Basic eDp5", "Bearer", "\x7f"))),
    ("Content-Encoding", lambda c: c.choice(("gzip", "br", "identity"))),
    ("If-None-Match", lambda c: c.choice(('"x"', "*", "W/"))),
    ("Range", lambda c: c.choice(("bytes=0-1", "bytes=9-1", "x"))),
    ("Origin", lambda c: c.choice(("null", "http://evil", "x"))),
    ("Expect", lambda c: c.choice(("100-continue", "x"))),
    ("Host", lambda c: c.choice(("", "evil:99999", "a" * 300))),
)


def judge(reply: Reply | None, method: str, *, raw: bool = False) -> str:
    """What came, in short. Raises `Finding` where that must not be."""
    if reply is None:
        if raw:
            return "closed"
        raise Finding("the server closed the connection without a response")
    if reply.status == 503 and LATE.encode() in reply.body:
        return "503 late"
    if reply.status >= 500 and reply.status != 504:
        raise Finding(f"{reply.status}: {reply.body[:300]!r}")
    if not 200 <= reply.status < 600:
        raise Finding(f"status {reply.status}")
    kind = reply.headers.get("content-type", "")
    if "json" in kind and "ndjson" not in kind and method != "HEAD":
        try:
            body = json.loads(reply.body)
        except ValueError:
            raise Finding(f"{reply.status} with a body that is no JSON") from None
        if reply.status >= 400 and not raw and not {"type", "error"} & set(body):
            raise Finding(f"{reply.status} that does not say what is wrong: {body}")
    elif reply.status >= 400 and not raw and method != "HEAD":
        raise Finding(f"{reply.status} as {kind or 'nothing'} instead of a problem")
    if reply.status == 504:
        return "504 deadline"
    return str(reply.status)


class HttpCases:
    """Makes and sends requests; one connection per worker."""

    def __init__(self, port: int, document: Any) -> None:
        """`document`: the OpenAPI document."""
        self._port = port
        self._document = document
        self._idle: list[Connection] = []

    def entries(self) -> list[Entry]:
        """An entry for each operation, one for uploads, one for what is no HTTP."""
        made = []
        for path, item in self._document["paths"].items():
            for method, operation in item.items():
                share = 3.0 if method == "post" else 1.0
                if "multipart/form-data" in self._contents(operation):
                    share = 1.0
                made.append(Entry(f"HTTP {method.upper()} {path}", self._of(path, method), share))
        uploads = [
            path
            for path, item in self._document["paths"].items()
            if "multipart/form-data" in self._contents(item.get("post", {}))
        ]
        return [
            *made,
            *(Entry(f"HTTP upload to {path}", self._uploading(path), 3.0) for path in uploads),
            Entry("HTTP pictures to /v1/chat/completions", self._picture, 6.0),
            Entry("HTTP, other paths and methods", self._elsewhere, 1.0),
            Entry("HTTP, malformed on the socket", self._malformed, 3.0),
        ]

    @staticmethod
    def _contents(operation: Any) -> Any:
        return operation.get("requestBody", {}).get("content", {})

    def _of(self, path: str, method: str) -> Any:
        operation = self._document["paths"][path][method]
        root = self._document["components"]["schemas"]
        content = self._contents(operation)
        schema = content.get("application/json", {}).get("schema")
        examples = [
            example["value"]
            for example in content.get("application/json", {}).get("examples", {}).values()
        ]

        async def run(chance: random.Random) -> str:
            target = self._target(chance, path, operation.get("parameters", []), root)
            headers = self._headers(chance)
            body = b""
            if schema is not None:
                if examples and chance.random() < 0.25:
                    value = chance.choice(examples)
                else:
                    value = values.of_schema(chance, schema, root)
                _limit(value)
                act = chance.random()
                if act < 0.55:
                    value = values.spoilt(chance, value)
                elif act < 0.62:
                    value = values.junk(chance)
                _limit(value)
                body = values.dumped(chance, value)
                if 0.62 <= act < 0.75:
                    body = values.mutated(chance, body)
                kind = "application/json" if chance.random() < 0.95 else chance.choice(_TYPES)
                headers.append(("Content-Type", kind))
            elif chance.random() < 0.05:
                body = chance.randbytes(200)
            return await self._send(method.upper(), target, headers, body)

        return run

    def _target(self, chance: random.Random, path: str, parameters: Any, root: Any) -> str:
        query = []
        for parameter in parameters:
            schema = parameter.get("schema", {})
            value = values.of_schema(chance, schema, root)
            if chance.random() < 0.4:
                value = values.junk(chance)
            piece = quote(str(value)[:2_000].encode("utf-8", "surrogatepass"), safe="")
            if parameter["in"] == "path":
                path = path.replace("{" + parameter["name"] + "}", piece or "x")
            elif parameter["in"] == "query" and chance.random() < 0.5:
                query.append(f"{parameter['name']}={piece}")
        if chance.random() < 0.1:
            query.append(quote(values.text(chance)[:200]))
        return path + ("?" + "&".join(query) if query else "")

    def _headers(self, chance: random.Random) -> list[tuple[str, str]]:
        return [(name, make(chance)) for name, make in _HEADERS if chance.random() < 0.06]

    def _uploading(self, path: str) -> Any:
        content = self._contents(self._document["paths"][path]["post"])
        schema = content["multipart/form-data"]["schema"]

        async def run(chance: random.Random) -> str:
            if path.startswith("/v1/audio"):
                kind, body = sound.upload(chance, schema)
                return await self._send("POST", path, [("Content-Type", kind)], body)
            kind, body = files.form(chance)
            target = path + chance.choice(
                ("", "", "?collection=fuzz", "?collection=%00", "?collection=")
            )
            return await self._send("POST", target, [("Content-Type", kind)], body)

        return run

    async def _picture(self, chance: random.Random) -> str:
        body = values.dumped(chance, pictures.chat(chance))
        headers = [("Content-Type", "application/json")]
        return await self._send("POST", "/v1/chat/completions", headers, body)

    async def _elsewhere(self, chance: random.Random) -> str:
        known = chance.choice(list(self._document["paths"]))
        target = chance.choice(
            (
                known,
                known + "/",
                known + "/" + quote(values.text(chance)[:80]),
                "/" + quote(values.text(chance)[:200]),
                "/web/" + chance.choice(("..%2f..%2fsettings.py", "../main.py", "%00", "app.js")),
                "/v1/traces/" + "0" * 32,
                "//v1/qa",
                "*",
            )
        )
        return await self._send(chance.choice(_METHODS), target, self._headers(chance), b"")

    async def _send(
        self, method: str, target: str, headers: list[tuple[str, str]], body: bytes
    ) -> str:
        given = {name for name, _ in headers}
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
        if "Host" not in given:
            lines.append("Host: localhost")
        if body or method in ("POST", "PUT", "PATCH"):
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"
        connection = self._idle.pop() if self._idle else Connection(self._port)
        # Bytes above ASCII, control characters and unknown methods are no valid HTTP; the parser
        # answers those itself, and closes.
        raw = method not in _METHODS[:8] or any(ord(c) < 32 or ord(c) > 126 for c in "".join(lines))
        raw = raw or not target.startswith("/")
        reply = await connection.send(head + body, method)
        self._idle.append(connection)
        return judge(reply, method, raw=raw)

    async def _malformed(self, chance: random.Random) -> str:
        body = b'{"question": "Who?", "context": "Ada wrote it."}'
        good = (
            b"POST /v1/qa HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        ) + body
        act = chance.randrange(12)
        if act <= 4:
            data = values.mutated(chance, good)
        elif act == 5:
            data = chance.randbytes(chance.choice((1, 30, 3_000)))
        elif act == 6:
            data = good[: chance.randrange(len(good))]
        elif act == 7:
            data = (
                b"GET / HTTP/1.1\r\nX-Long: "
                + b"a" * chance.choice((60_000, 300_000))
                + b"\r\n\r\n"
            )
        elif act == 8:
            lines = b"".join(b"X-%d: y\r\n" % n for n in range(chance.choice((100, 5_000))))
            data = b"GET /healthz HTTP/1.1\r\n" + lines + b"\r\n"
        elif act == 9:
            lengths = (b"-1", b"99999999999999999999", b"0x10", b"5, 6", b"", b"10000000000")
            data = good.replace(b"%d" % len(body), chance.choice(lengths))
        elif act == 10:
            chunks = (b"ZZ\r\n", b"5\r\nab", b"ffffffffffffffff\r\nx", b"0\r\n\r\n", b"-1\r\n\r\n")
            data = (
                b"POST /v1/qa HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n" + chance.choice(chunks)
            )
        else:
            others = (
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01",
                b"GET /\r\n\r\n",
            )
            data = chance.choice((*others, good * 20, b"\r\n" * 500))
        connection = Connection(self._port)
        try:
            reply = await connection.send(data, "POST", whole=False)
        finally:
            connection.close()
        return judge(reply, "POST", raw=True)


def _limit(value: Any) -> None:
    """Bounds how much is to be written, where the case does not ask for nonsense anyway."""
    if isinstance(value, dict):
        for name in ("max_tokens", "max_completion_tokens"):
            if name in value or "messages" in value or "prompt" in value:
                given = value.get(name)
                if given is None or (isinstance(given, int) and given > _MOST_TOKENS):
                    value[name] = _MOST_TOKENS
        for name in ("n", "best_of"):
            if isinstance(value.get(name), int) and value[name] > 2:
                value[name] = 2
