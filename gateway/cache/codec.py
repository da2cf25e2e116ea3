"""Keys and envelopes: what is asked of a cache, and how its replies are trusted."""

from __future__ import annotations

import hashlib
import hmac

VERSION = b"\x01"
_SEAL_BYTES = 16


class Sealer:
    """Makes keys that reveal nothing, and seals values so that only ours open.

    A value is sealed together with its key: what is cut short, changed, of another
    version, moved from another key or made with another secret does not open.
    """

    def __init__(self, secret: str) -> None:
        """`secret`: any text; equal in all gateways that share a cache."""
        # blake2b takes at most 64 bytes of key.
        self._secret = hashlib.blake2b(secret.encode(), digest_size=64).digest()

    def key(self, kind: bytes, *parts: str | bytes) -> bytes:
        """A cache key: `kind` and a keyed hash of the parts in their order."""
        digest = hashlib.blake2b(kind, digest_size=32, key=self._secret)
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return kind + b":" + digest.hexdigest().encode()

    def _seal(self, key: bytes, payload: bytes) -> bytes:
        digest = hashlib.blake2b(VERSION + key, digest_size=_SEAL_BYTES, key=self._secret)
        digest.update(payload)
        return digest.digest()

    def wrap(self, key: bytes, payload: bytes) -> bytes:
        """The payload in its envelope: version, seal, payload."""
        return VERSION + self._seal(key, payload) + payload

    def open(self, key: bytes, value: bytes) -> bytes | None:
        """The payload, or `None` where the value is not one that `wrap` made for `key`."""
        header = 1 + _SEAL_BYTES
        if len(value) < header or value[:1] != VERSION:
            return None
        payload = value[header:]
        seal = self._seal(key, payload)
        return payload if hmac.compare_digest(seal, value[1:header]) else None
