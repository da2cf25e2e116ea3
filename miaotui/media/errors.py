"""What can be wrong with a sound or a picture. Messages never hold anything of it."""

from __future__ import annotations

from miaotui.text.errors import TextError


class MediaError(TextError):
    """A file that is broken, of an unknown kind, too large or too long."""
