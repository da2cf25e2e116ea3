"""Makes smaller and faster checkpoints of extractive models, which the shards serve directly."""

from miaotui.compression.compress import compress_model
from miaotui.compression.errors import CompressionError

__all__ = ["CompressionError", "compress_model"]
