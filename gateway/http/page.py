"""The web page: HTML, styles and modules, under a content security policy that names what runs.

Files are read once and served as they are: there is no build. They bear an entity tag, and
browsers ask whether it holds, so that a new version is there at once and nothing is sent twice.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from gateway.errors import GatewayError

_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)
# A host header goes into the policy only where it is a plain host: anything else could end it.
_HOST = re.compile(r"([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::\d{1,5})?")
_SELF = "'self'"
_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}


class Asset:
    """A file that the gateway serves."""

    def __init__(self, path: Path) -> None:
        """Reads the file. Raises `FileNotFoundError`; `KeyError` for a type not served."""
        self._content = path.read_bytes()
        self._media_type = _TYPES[path.suffix]
        self._tag = f'"{hashlib.sha256(self._content).hexdigest()[:32]}"'

    @property
    def content(self) -> bytes:
        """The file's bytes."""
        return self._content

    def response(self, request: Request) -> Response:
        """The file, or 304 where the browser has it."""
        headers = {"ETag": self._tag, "Cache-Control": "no-cache", **self._headers(request)}
        known = request.headers.get("if-none-match", "")
        if self._tag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(self._content, headers=headers, media_type=self._media_type)

    def _headers(self, _: Request) -> dict[str, str]:
        return {}


class Page(Asset):
    """A page whose scripts and styles are the inline ones it came with, and the gateway's own.

    It may talk to its own gateway, to other ports of the same host (another gateway to compare
    with), and to `origins`.
    """

    def __init__(self, path: Path, origins: Sequence[str] = ()) -> None:
        """Reads the page. Raises `FileNotFoundError`."""
        super().__init__(path)
        hashes: dict[str, list[str]] = {"script": [], "style": []}
        for tag, text in _INLINE.findall(self.content):
            digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
            hashes[tag.decode()].append(f"'sha256-{digest}'")
        self._policy = [
            "default-src 'none'",
            *(f"{tag}-src {' '.join([*found, _SELF])}" for tag, found in hashes.items()),
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
        self._origins = [origin for origin in origins if origin != "*"]

    def _headers(self, request: Request) -> dict[str, str]:
        allowed = [_SELF, *self._origins]
        if host := _HOST.fullmatch(request.headers.get("host", "")):
            allowed += [f"{scheme}://{host[1]}:*" for scheme in ("http", "https")]
        policy = [*self._policy, f"connect-src {' '.join(allowed)}"]
        return {"Content-Security-Policy": "; ".join(policy)}


class WebFiles:
    """The folder of the web page."""

    def __init__(self, folder: Path, origins: Sequence[str] = ()) -> None:
        """Reads all files; `origins`: those of other gateways that the page may talk to."""
        self._assets = {
            path.relative_to(folder).as_posix(): (
                Page(path, origins) if path.suffix == ".html" else Asset(path)
            )
            for path in sorted(folder.rglob("*"))
            if path.suffix in _TYPES
        }

    def page(self, name: str, request: Request) -> Response:
        """A page by its file's name."""
        return self._assets[name].response(request)

    async def file(self, request: Request) -> Response:
        """GET /web/{name}"""
        asset = self._assets.get(request.path_params["name"])
        if asset is None:
            raise GatewayError("not-found", "The web page has no such file.")
        return asset.response(request)
