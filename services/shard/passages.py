"""What stage 0 has computed of passages, in Redis: for its replicas, and after a restart."""

from __future__ import annotations

import asyncio
import logging
import struct
import threading
from collections.abc import Callable, Mapping

import numpy as np
import torch
from opentelemetry import metrics
from opentelemetry.metrics import Observation

from miaotui.models.decomposed import PassageCache, divide, passage_names
from miaotui.models.stage import StageBatch, StageModel
from services.cache.codec import Sealer
from services.cache.redis import RedisBackend
from services.shard.settings import ShardSettings

log = logging.getLogger(__name__)

# Operations at once, of the backend's connections.
_AT_ONCE = 16
# Passages that wait to be written hold at most so much; more are not written.
_WAITING_BYTES = 64 * 1024 * 1024

_HEADER = struct.Struct("<4sBII")
_MAGIC = b"MTP1"
# By their codes in values: these must stay as they are.
_DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# Integers of the same width, by which numpy moves the bits: it has no bfloat16.
_BITS = {4: (torch.int32, "<i4"), 2: (torch.int16, "<i2")}


def pack(hidden: torch.Tensor) -> bytes:
    """A passage's [tokens, hidden_size] as a header of dtype and shape, and little-endian bytes."""
    tokens, width = hidden.shape
    bits, order = _BITS[hidden.element_size()]
    rows = hidden.cpu().contiguous().view(bits).numpy().astype(order, copy=False)
    return _HEADER.pack(_MAGIC, _CODES[hidden.dtype], tokens, width) + rows.tobytes()


def unpack(payload: bytes, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor | None:
    """What `pack` made of a tensor of this shape and dtype; None where it is of no such."""
    if payload[: _HEADER.size] != _HEADER.pack(_MAGIC, _CODES[dtype], *shape):
        return None
    _, order = _BITS[dtype.itemsize]
    if len(payload) != _HEADER.size + shape[0] * shape[1] * dtype.itemsize:
        return None
    rows = np.frombuffer(payload, order, offset=_HEADER.size).astype(order[1:])
    return torch.from_numpy(rows).view(dtype).view(shape)


class SharedPassages:
    """A second level behind a stage's `PassageCache`. A sick Redis is a miss and nothing worse.

    Looked at before a batch is submitted, on the event loop, since on the compute thread other
    batches would wait for the network, too; written to from a queue, after the batch. Made on the
    loop that it is used on.
    """

    def __init__(
        self,
        model: StageModel,
        cache: PassageCache,
        backend: RedisBackend,
        sealer: Sealer,
        failed: Callable[[str], None],
        *,
        timeout: float,
        largest: int,
    ) -> None:
        """`failed` counts values that do not open; it gets "garbage". `timeout`: the backend's,
        in seconds. `largest`: bytes of activations; larger passages are neither read nor written.
        """
        self._cache = cache
        self._backend = backend
        self._sealer = sealer
        self._failed = failed
        self._reading = model.reading
        self._dtype = model.dtype
        self._width = model.info.hidden_size
        self._timeout = timeout
        self._largest = largest
        self._loop = asyncio.get_running_loop()
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._queue: asyncio.Queue[tuple[bytes, torch.Tensor]] = asyncio.Queue()
        self._waiting = 0
        self._lock = threading.Lock()
        self._writer = self._loop.create_task(self._write())
        cache.on_computed = self.keep

    @property
    def healthy(self) -> bool:
        """Whether Redis is being used now."""
        return self._backend.healthy

    async def find(self, inputs: StageBatch) -> dict[bytes, torch.Tensor] | None:
        """What Redis has of the passages that are not in memory, by their names.

        None: it was not asked, because all are in memory, or too large, or it does not answer.
        """
        try:
            return await self._find(inputs)
        except Exception:
            # A batch that is not computed for this would never answer.
            log.exception("could not look for passages in Redis")
            return {}

    async def _find(self, inputs: StageBatch) -> dict[bytes, torch.Tensor] | None:
        if inputs.input_ids is None or not self._backend.healthy:
            return None
        ids, types = inputs.input_ids, inputs.token_type_ids
        parts = divide(inputs.lengths, types)
        names = passage_names(parts, ids, types, inputs.salts)
        token_bytes = self._width * self._dtype.itemsize
        wanted = {
            name: part.tokens
            for part, name in zip(parts, names, strict=True)
            if name is not None
            and part.tokens * token_bytes <= self._largest
            and name not in self._cache
        }
        if not wanted:
            return None
        keys = {name: self._key(name) for name in wanted}
        until = self._loop.time() + self._timeout
        values = await asyncio.gather(*(self._get(key, until) for key in keys.values()))
        got = {
            name: (keys[name], value, (tokens, self._width))
            for (name, tokens), value in zip(wanted.items(), values, strict=True)
            if value is not None
        }
        # On a thread: a batch's values may be megabytes, and all of them are hashed.
        return await asyncio.to_thread(self._open, got) if got else {}

    def keep(self, name: bytes, hidden: torch.Tensor) -> None:
        """Has a passage's activations written soon, if there is room; from any thread."""
        if not self._backend.healthy or hidden.nbytes > self._largest:
            return
        with self._lock:
            if self._waiting + hidden.nbytes > _WAITING_BYTES:
                return
            self._waiting += hidden.nbytes
        # The loop outlives the compute thread.
        self._loop.call_soon_threadsafe(self._queue.put_nowait, (name, hidden))

    async def close(self) -> None:
        """Drops what waits, and closes the connections."""
        self._cache.on_computed = None
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)
        await self._backend.close()

    def _key(self, name: bytes) -> bytes:
        return self._sealer.key(b"passage", self._reading, name)

    async def _get(self, key: bytes, until: float) -> bytes | None:
        async with self._at_once:
            # Redis is there, and slow: those that had to wait for their turn are computed.
            return None if self._loop.time() > until else await self._backend.get(key)

    def _open(
        self, got: Mapping[bytes, tuple[bytes, bytes, tuple[int, int]]]
    ) -> dict[bytes, torch.Tensor]:
        found = {}
        for name, (key, value, shape) in got.items():
            payload = self._sealer.open(key, value)
            hidden = None if payload is None else unpack(payload, shape, self._dtype)
            if hidden is None:
                self._failed("garbage")
            else:
                found[name] = hidden
        return found

    def _wrap(self, key: bytes, hidden: torch.Tensor) -> bytes:
        return self._sealer.wrap(key, pack(hidden))

    async def _write(self) -> None:
        while True:
            name, hidden = await self._queue.get()
            try:
                key = self._key(name)
                await self._backend.put(key, await asyncio.to_thread(self._wrap, key, hidden))
            except Exception:
                # Whatever it is, the next one may be written.
                log.exception("could not write a passage's activations")
            finally:
                with self._lock:
                    self._waiting -= hidden.nbytes


def share_passages(settings: ShardSettings, model: StageModel) -> SharedPassages | None:
    """The second level that the settings ask for, where the model has passages to keep.

    Raises `ValueError` where the Redis URL is not one.
    """
    url, secret = settings.passage_redis_url, settings.passage_redis_secret
    if url is None or secret is None or model.passages is None:
        return None
    labels = {"miaotui.stage": settings.stage}
    meter = metrics.get_meter("miaotui.shard")
    failures = meter.create_counter(
        "miaotui.stage.passages.redis.failures",
        unit="{operation}",
        description="Operations in Redis that failed, by reason; garbage: was not written so",
    )

    def failed(reason: str) -> None:
        failures.add(1, {**labels, "reason": reason})

    backend = RedisBackend(
        url.get_secret_value(),
        settings.passage_redis_ttl_seconds,
        settings.passage_redis_timeout,
        failed,
    )
    meter.create_observable_gauge(
        "miaotui.stage.passages.redis.up",
        callbacks=[lambda _: [Observation(int(backend.healthy), labels)]],
        description="1 while Redis is used, 0 while it is avoided because it failed",
    )
    encryption = settings.passage_redis_encryption_key
    sealer = Sealer(
        secret.get_secret_value(), None if encryption is None else encryption.get_secret_value()
    )
    return SharedPassages(
        model,
        model.passages,
        backend,
        sealer,
        failed,
        timeout=settings.passage_redis_timeout,
        largest=settings.passage_redis_entry_bytes,
    )
