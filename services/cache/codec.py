"""Keys and envelopes: what is asked of a cache, and how its replies are trusted."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

VERSION = b"\x01"
ENCRYPTED = b"\x02"
_SEAL_BYTES = 16
_NONCE_BYTES = 12


class Sealer:
    """Makes keys that reveal nothing, and seals values so that only ours open.

    A value is sealed together with its key: what is cut short, changed, of another
    version, moved from another key or made with another secret does not open. With an
    encryption key it cannot be read, either: AES-256-GCM (NIST SP 800-38D), its nonce drawn, the
    cache key as associated data. Each cache key has an AES key of its own: the few values
    that are ever written under it keep clear of the 2^32 that drawn nonces allow a key.
    """

    def __init__(self, secret: str, encryption_key: str | None = None) -> None:
        """Both: any text; equal in all gateways that share a cache. `None`: no encryption."""
        # blake2b takes at most 64 bytes of key.
        self._secret = hashlib.blake2b(secret.encode(), digest_size=64).digest()
        self._encryption: bytes | None = None
        if encryption_key is not None:
            key = hashlib.blake2b(encryption_key.encode(), digest_size=64, key=self._secret)
            self._encryption = key.digest()

    def key(self, kind: bytes, *parts: str | bytes) -> bytes:
        """A cache key: `kind` and a keyed hash of the parts in their order."""
        pieces = [kind]
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            pieces += (len(data).to_bytes(8, "little"), data)
        digest = hashlib.blake2b(b"".join(pieces), digest_size=32, key=self._secret)
        return b"%b:%b" % (kind, digest.hexdigest().encode())

    def salt(self, name: str) -> bytes:
        """16 bytes that stand for a name and do not tell it; nothing for an empty one."""
        if not name:
            return b""
        return hashlib.blake2b(
            name.encode(), digest_size=16, key=self._secret, person=b"salt"
        ).digest()

    def _seal(self, key: bytes, payload: bytes) -> bytes:
        digest = hashlib.blake2b(VERSION + key, digest_size=_SEAL_BYTES, key=self._secret)
        digest.update(payload)
        return digest.digest()

    def _cipher(self, secret: bytes, key: bytes) -> AESGCM:
        return AESGCM(hashlib.blake2b(key, digest_size=32, key=secret).digest())

    def wrap(self, key: bytes, payload: bytes) -> bytes:
        """The payload in its envelope: version, seal, payload; or version, nonce, ciphertext."""
        if self._encryption is not None:
            nonce = secrets.token_bytes(_NONCE_BYTES)
            cipher = self._cipher(self._encryption, key)
            return ENCRYPTED + nonce + cipher.encrypt(nonce, payload, ENCRYPTED + key)
        return VERSION + self._seal(key, payload) + payload

    def open(self, key: bytes, value: bytes) -> bytes | None:
        """The payload, or `None` where the value is not one that `wrap` made for `key`."""
        if self._encryption is not None:
            return self._decrypted(self._encryption, key, value)
        header = 1 + _SEAL_BYTES
        if len(value) < header or value[:1] != VERSION:
            return None
        payload = value[header:]
        seal = self._seal(key, payload)
        return payload if hmac.compare_digest(seal, value[1:header]) else None

    def _decrypted(self, secret: bytes, key: bytes, value: bytes) -> bytes | None:
        if value[:1] != ENCRYPTED:
            return None
        nonce, ciphertext = value[1 : 1 + _NONCE_BYTES], value[1 + _NONCE_BYTES :]
        try:
            return self._cipher(secret, key).decrypt(nonce, ciphertext, ENCRYPTED + key)
        except (InvalidTag, ValueError):
            return None
