"""Cases of gRPC: every method of every service, with messages right, wrong, and none at all."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc import aio
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from services.rpc.channel import open_channel
from tests.fuzz import values
from tests.fuzz.cases import HANG_SECONDS, LATE, Entry, Finding
from tests.fuzz.messages import changed_message, random_message
from tests.fuzz.requests import Making

LOCAL = "Internal error from Core"
_READ = 40
"""Responses of a stream that are read before the client goes away."""
_BAD = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS)
_BAD_NUMBERS = {code.value[0] for code in _BAD}


class RpcCases:
    """Makes and sends calls to one server."""

    def __init__(
        self,
        name: str,
        target: str,
        services: Iterable[ServiceDescriptor],
        good: Mapping[str, Making],
        share: Callable[[str], float] = lambda _: 1.0,
    ) -> None:
        """`name`: the server's, for reports; `good`: see `good_requests`."""
        self._name = name
        self._target = target
        self._services = tuple(services)
        self._share = share
        self._good = good
        self._channel: aio.Channel | None = None

    def entries(self) -> list[Entry]:
        """One for each method, and one for bytes that are no gRPC."""
        made = []
        for service in self._services:
            for method in service.methods:
                name = f"{service.name}/{method.name}"
                entry = f"gRPC {self._name} {name}"
                made.append(Entry(entry, self._of(service, method), self._share(name)))
        return [*made, Entry(f"gRPC {self._name}, no gRPC on the port", self._socket, 0.3)]

    def _open(self) -> aio.Channel:
        if self._channel is None:
            self._channel = open_channel(self._target)
        return self._channel

    async def close(self) -> None:
        """Closes the channel."""
        if self._channel is not None:
            await self._channel.close()

    def _of(self, service: ServiceDescriptor, method: MethodDescriptor) -> Any:
        good = self._good.get(f"{service.name}/{method.name}")
        path = f"/{service.full_name}/{method.name}"
        endless = method.name == "Watch"

        async def run(chance: random.Random) -> str:
            timeout = HANG_SECONDS
            if chance.random() < 0.08:
                timeout = chance.choice((0.0005, 0.005, 0.05))
            count = chance.choice((0, 1, 1, 2, 5)) if method.client_streaming else 1
            right = good(chance) if good is not None else None
            sent = [_encoded(chance, method, right, number) for number in range(count)]
            stop = 0.05 if endless else 0.02 if chance.random() < 0.07 else 0.0
            try:
                async with asyncio.timeout(stop or None):
                    await self._call(path, method, sent, timeout)
            except TimeoutError:
                return "cancelled"
            except aio.AioRpcError as error:
                return _judge(error, timeout)
            except cygrpc.ExecuteBatchError:
                return "ended while sending"
            return "OK"

        return run

    async def _call(
        self, path: str, method: MethodDescriptor, sent: list[bytes], timeout: float
    ) -> None:
        channel: Any = self._open()
        call: Any
        if not method.client_streaming and not method.server_streaming:
            _check(method, await channel.unary_unary(path)(sent[0], timeout=timeout))
            return
        if method.client_streaming:
            call = channel.stream_stream(path)(timeout=timeout)
        else:
            call = channel.unary_stream(path)(sent[0], timeout=timeout)
        try:
            if method.client_streaming:
                with suppress(asyncio.InvalidStateError):
                    for data in sent:
                        await call.write(data)
                    await call.done_writing()
            for _ in range(_READ):
                response = await call.read()
                if response is aio.EOF:
                    # Raises what the call ended with.
                    code = await call.code()
                    if code is not grpc.StatusCode.OK:
                        details = await call.details()
                        raise aio.AioRpcError(code, aio.Metadata(), aio.Metadata(), details)
                    return
                _check(method, response)
        finally:
            call.cancel()

    async def _socket(self, chance: random.Random) -> str:
        """HTTP/1, a broken preface, or anything."""
        host, _, port = self._target.rpartition(":")
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        frame = chance.randbytes(3) + bytes([chance.randrange(12)]) + chance.randbytes(5)
        data = chance.choice(
            (
                b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                preface[: chance.randrange(len(preface))],
                preface + frame + chance.randbytes(chance.choice((0, 10, 500))),
                preface + bytes(3) + b"\4" + bytes(5) + frame * 20,
                values.mutated(chance, preface + bytes(3) + b"\4" + bytes(5)),
                chance.randbytes(100),
            )
        )
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(data)
            with suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(0.1):
                    await writer.drain()
                    await reader.read(1000)
        finally:
            writer.close()
        return "closed"


def ended_early(error: aio.AioRpcError) -> bool:
    """Whether the server had ended the stream before the client had sent everything.

    The client's library says INTERNAL then, whatever the server's status; a failure of the
    server's would be in its log.
    """
    return error.code() is grpc.StatusCode.INTERNAL and error.details() == LOCAL


def _encoded(
    chance: random.Random, method: MethodDescriptor, good: Message | None, number: int
) -> bytes:
    act = chance.random()
    message = good
    if message is None or act > 0.7:
        message = random_message(chance, method.input_type)
    elif act > 0.2:
        message = changed_message(chance, message)
    header = message.DESCRIPTOR.fields_by_name.get("call")
    if header is not None and chance.random() < 0.8:
        copy: Any = type(message)()
        copy.CopyFrom(message)
        # Mostly an id of its own, sometimes one that is taken.
        copy.call.call_id = number + 1 if chance.random() < 0.8 else chance.randrange(3)
        copy.call.timeout_micros = chance.choice((0, 5_000_000, 5_000_000, 1, 2**63))
        copy.call.cancel = chance.random() < 0.1
        message = copy
    data = message.SerializeToString()
    if chance.random() < 0.3:
        return values.mutated(chance, data)
    return data if chance.random() < 0.97 else chance.randbytes(chance.choice((1, 20, 5_000)))


def _check(method: MethodDescriptor, response: bytes) -> None:
    """A response must be one, and the calls within it must have ended as they may."""
    kind = GetMessageClass(method.output_type)
    try:
        message: Any = kind.FromString(response)
    except DecodeError:
        raise Finding("a response that is none") from None
    if "call" in kind.DESCRIPTOR.fields_by_name:
        statuses = [message.call]
    elif "updates" in kind.DESCRIPTOR.fields_by_name:
        statuses = [update.ended for update in message.updates]
    else:
        return
    for status in statuses:
        if status.code in _BAD_NUMBERS:
            raise Finding(f"a call on the stream ended with {status.code}: {status.message}")


def _judge(error: aio.AioRpcError, timeout: float) -> str:
    code = error.code()
    if ended_early(error):
        return "ended while sending"
    if code in _BAD:
        raise Finding(f"{code.name}: {error.details()}")
    if code is grpc.StatusCode.UNAVAILABLE and LATE not in (error.details() or ""):
        raise Finding(f"UNAVAILABLE: {error.details()}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and timeout >= HANG_SECONDS:
        raise Finding(f"no end within {timeout:.0f} s")
    return str(code.name)
