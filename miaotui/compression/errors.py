"""What can be wrong with what is asked of a compression."""

from __future__ import annotations

from miaotui.models.errors import ModelError


class CompressionError(ModelError):
    """The model or the method asked for cannot be compressed so; the message says why."""
