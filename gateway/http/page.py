"""Self-contained HTML pages under a content security policy that names what they hold."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


class Page:
    """A page whose only scripts and styles are the inline ones it came with."""

    def __init__(self, path: Path) -> None:
        """Reads the page. Raises `FileNotFoundError`."""
        self._content = path.read_bytes()
        hashes: dict[str, list[str]] = {"script": [], "style": []}
        for tag, text in _INLINE.findall(self._content):
            digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
            hashes[tag.decode()].append(f"'sha256-{digest}'")
        policy = [
            "default-src 'none'",
            *(f"{tag}-src {' '.join(found)}" for tag, found in hashes.items() if found),
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
        self._headers = {
            "Content-Security-Policy": "; ".join(policy),
            "Cache-Control": "no-cache",
        }

    def response(self) -> Response:
        """The page."""
        return Response(self._content, headers=self._headers, media_type="text/html")
