"""Pictures in chats: of OpenAI's image parts, those that bring the picture with them."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.errors import FieldError, GatewayError
from gateway.schema import invalid
from gateway.settings import GatewaySettings

IMAGE_PART = "image_url"
TEXT_ONLY = "images, sound and files are not taken: the model reads text only"

_DATA = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture file, and the JSON pointer to where it stood."""

    data: bytes
    place: str


class Pictures:
    """Those of a chat that is being read. The last message's is what a text is to be about."""

    def __init__(self, settings: GatewaySettings, last: str) -> None:
        """`last`: JSON pointer to the last message."""
        self._settings = settings
        self._last = last
        self.found: Picture | None = None

    def take(self, part: Mapping[str, Any], place: str) -> None:
        """Takes a part of a message. Raises `GatewayError`."""
        if not self._settings.captioner_shard:
            raise _fault(place, TEXT_ONLY)
        if not place.startswith(f"{self._last}/"):
            return  # was told of before
        if self.found is not None:
            raise _fault(place, "must be the message's only picture; send one a request")
        self.found = Picture(self._data(part, place), place)

    def _data(self, part: Mapping[str, Any], place: str) -> bytes:
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, Mapping) else image
        if not isinstance(url, str):
            raise _fault(place, 'must be {"type": "image_url", "image_url": {"url": "data:…"}}')
        begin = _DATA.match(url)
        if begin is None:
            raise _fault(
                place,
                "must be a data URL (data:image/png;base64,…): nothing is downloaded from here",
            )
        most = self._settings.max_picture_bytes
        if (len(url) - begin.end()) * 3 // 4 > most + 2:
            raise _fault(place, f"must be a picture of at most {most} bytes")
        try:
            return base64.b64decode(url[begin.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise _fault(place, "is no valid base64") from None


def _fault(place: str, detail: str) -> GatewayError:
    return invalid([FieldError(place, detail)])
