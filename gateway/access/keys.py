"""API keys and what is kept of them.

A key is `mt_<id>_<secret>`. The id names it in lists, logs and metrics; of the secret only
its SHA-256 is kept. Slow hashes (bcrypt, Argon2) protect passwords that people choose; a
secret of 256 random bits cannot be guessed whatever the hash costs, and a fast one is checked
within a microsecond on every request. A key for the hash (HMAC) would add nothing to that and
be one more secret to share among gateways.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from datetime import UTC, datetime
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

PREFIX = "mt"
# What every caller owned before there were keys: documents and caches without a tenant.
DEFAULT_TENANT = "default"
_ID_BYTES = 6
_SECRET_BYTES = 32
_KEY = re.compile(rf"{PREFIX}_([0-9a-f]{{{2 * _ID_BYTES}}})_([0-9a-f]{{{2 * _SECRET_BYTES}}})")
# No id at all, so that an unknown key costs as much as a wrong one.
_NOBODY = hashlib.sha256(b"").hexdigest()

Scope = Literal["ask", "write", "documents", "observe"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_SCOPES: tuple[Scope, ...] = ("ask", "write", "documents")

_Count = Annotated[int, Field(gt=0, le=10**12)]
_Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100)]
Tenant = Annotated[str, StringConstraints(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?$")]


class Rate(BaseModel):
    """So many requests in so many seconds; all of them may come at once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: _Count
    seconds: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class Limits(BaseModel):
    """How much a key may do; `None`: as much as it likes. Days are UTC's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rate: Rate | None = None
    requests_per_day: _Count | None = None
    tokens_per_day: _Count | None = None
    concurrency: _Count | None = None

    @property
    def any(self) -> bool:
        """Whether there is a limit at all."""
        return self != _UNLIMITED


_UNLIMITED = Limits()


class ApiKey(BaseModel):
    """What is kept of a key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, StringConstraints(pattern=rf"^[0-9a-f]{{{2 * _ID_BYTES}}}$")]
    name: _Name
    tenant: Tenant
    secret_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...] = DEFAULT_SCOPES
    limits: Limits = _UNLIMITED
    created: datetime
    revoked: datetime | None = None


def make_key(
    name: str,
    *,
    tenant: str | None = None,
    scopes: tuple[Scope, ...] = DEFAULT_SCOPES,
    limits: Limits = _UNLIMITED,
) -> tuple[ApiKey, str]:
    """A new key, and its text, which is nowhere else. `tenant` `None`: one of its own.

    Raises `ValueError` where an argument is not valid.
    """
    identifier = secrets.token_hex(_ID_BYTES)
    secret = secrets.token_hex(_SECRET_BYTES)
    key = ApiKey(
        id=identifier,
        name=name,
        tenant=identifier if tenant is None else tenant,
        secret_sha256=_hash(identifier, secret),
        scopes=scopes,
        limits=limits,
        created=datetime.now(UTC).replace(microsecond=0),
    )
    return key, f"{PREFIX}_{identifier}_{secret}"


def split_key(text: str) -> tuple[str, str] | None:
    """Id and secret of a key; `None` where `text` is none."""
    found = _KEY.fullmatch(text)
    return None if found is None else (found[1], found[2])


def matches(key: ApiKey | None, identifier: str, secret: str) -> bool:
    """Whether the secret is the key's; takes as long whatever is wrong."""
    wanted = _NOBODY if key is None else key.secret_sha256
    fits = hmac.compare_digest(_hash(identifier, secret), wanted)
    return fits and key is not None


def _hash(identifier: str, secret: str) -> str:
    return hashlib.sha256(f"{PREFIX}_{identifier}_{secret}".encode()).hexdigest()
