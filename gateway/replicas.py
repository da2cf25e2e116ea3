"""The replicas of a service behind the gateway: which are well, and which one gets a call."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.rpc.breaker import CircuitBreaker, RetryBudget
from services.rpc.channel import open_channel
from services.rpc.endpoints import Endpoints

log = logging.getLogger(__name__)
T = TypeVar("T")
Request = TypeVar("Request")
Response = TypeVar("Response")

LOOK_SECONDS = 1.5
# A busy machine answers late, and that alone is no reason to send all requests away.
LATE_LOOKS = 3


class Replica(Generic[T]):
    """One replica: its channel, and what it last told of itself (`T`: a Describe's response).

    What it told holds until its connection breaks: only then can another process, perhaps with
    another model, stand behind its address.
    """

    def __init__(self, name: str, address: str, lost: Callable[[], None]) -> None:
        """`name`: of the service, for people. `lost` is called when the connection breaks."""
        self.name = name
        self.address = address
        self.channel = open_channel(address)
        self.breaker = CircuitBreaker()
        self.told: T | None = None
        """While it is well."""
        self.described: T | None = None
        """What it said last, well or not."""
        self.reason = f"The gateway has not looked at {name} yet."
        """Why it gets no calls."""
        self.late = 0
        """Looks in a row that it did not answer in time."""
        self._lost = lost
        self._breaks = 0
        self._health = health_pb2_grpc.HealthStub(self.channel)
        self._watching = asyncio.create_task(self._watch())

    @property
    def outstanding(self) -> int:
        """Calls that it works on."""
        return 0

    async def describe(self) -> T:
        """Asks it who it is. Raises `AioRpcError`."""
        raise NotImplementedError

    async def look(self) -> None:
        """Asks it who it is and whether it is healthy."""
        breaks = self._breaks
        try:
            described, healthy = await asyncio.gather(self.describe(), self._healthy())
        except aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self.late += 1
                self.reason = f"{self.name} does not answer in time."
                if self.late < LATE_LOOKS:
                    return
            else:
                self.reason = f"{self.name} does not answer ({error.code().name})."
            self.told = None
            return
        self.late = 0
        self.described = described
        if self._breaks != breaks:
            self.told, self.reason = None, "A service behind the gateway has just restarted."
        elif not healthy:
            self.told, self.reason = None, f"{self.name} reports that it does not serve yet."
        else:
            self.told, self.reason = described, ""
            if self.breaker.state != "open":
                self.breaker.succeeded()

    async def _healthy(self) -> bool:
        request = health_pb2.HealthCheckRequest()
        check: Awaitable[health_pb2.HealthCheckResponse]
        check = self._health.Check(request, timeout=LOOK_SECONDS)  # type: ignore[attr-defined]
        return (await check).status == health_pb2.HealthCheckResponse.SERVING

    async def _watch(self) -> None:
        state = self.channel.get_state(try_to_connect=True)
        while True:
            await self.channel.wait_for_state_change(state)
            before, state = state, self.channel.get_state(try_to_connect=True)
            if before is grpc.ChannelConnectivity.READY:
                self._breaks += 1
                self.told, self.reason = None, f"The connection to {self.name} was lost."
                self._lost()

    def drop(self) -> None:
        """Fails the calls that it works on, because it hangs: others are to do them."""
        self.told = None
        self.breaker.failed()

    def ended(self, error: aio.AioRpcError | None) -> None:
        """Tells how a call of it ended."""
        if error is None:
            if self.breaker.failures:
                self.breaker.succeeded()
        elif error.code() is grpc.StatusCode.UNAVAILABLE:
            self.breaker.failed()
        else:
            self.breaker.gave_up()

    async def close(self) -> None:
        """Ends the link."""
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self.channel.close()


R = TypeVar("R", bound=Replica[Any])


def choose(replicas: Sequence[R], besides: Iterable[R] = ()) -> R:
    """The replica with the least work among those that are well; one of `besides` last of all."""
    if len(replicas) == 1:
        return replicas[0]
    avoided = set(besides)
    return min(
        replicas,
        key=lambda one: (
            one in avoided,
            one.told is None,
            one.breaker.state == "open",
            one.late > 0,
            one.outstanding,
            random.random(),
        ),
    )


class Replicas(Generic[R]):
    """A service's replicas, as they come and go."""

    def __init__(self, addresses: Iterable[str], make: Callable[[str], R]) -> None:
        """`addresses`: host:port each, or a DNS name that leads to several."""
        self._endpoints = Endpoints(addresses)
        self._make = make
        self._known: dict[str, R] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def all(self) -> list[R]:
        """Well or not."""
        return list(self._known.values())

    async def refresh(self) -> None:
        """Adds those that are new, and lets go of those that are no more."""
        addresses = await self._endpoints.refresh()
        for address in addresses:
            if address not in self._known:
                self._known[address] = self._make(address)
        for address in self._known.keys() - set(addresses):
            # Its calls may still be under way: it goes when its connection does.
            if self._known[address].told is None and not self._known[address].outstanding:
                task = asyncio.create_task(self._known.pop(address).close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Ends all links."""
        await asyncio.gather(*(one.close() for one in self._known.values()), *self._closing)


class Balanced(Generic[R, Request, Response]):
    """A unary method of whichever replica has the least work, and of another where one is gone."""

    def __init__(
        self,
        replicas: Callable[[], Sequence[R]],
        method: Callable[[R], Callable[..., Awaitable[Response]]],
        budget: RetryBudget,
    ) -> None:
        """`replicas`: those that may be called now, at least one; `method`: of one of them."""
        self._replicas = replicas
        self._method = method
        self._budget = budget

    async def __call__(
        self, request: Request, /, *, timeout: float | None = None, metadata: Any = None
    ) -> Response:
        """Raises `grpc.aio.AioRpcError`. `timeout` in seconds, of all tries together."""
        self._budget.first()
        loop = asyncio.get_running_loop()
        end = None if timeout is None else loop.time() + timeout
        tried: list[R] = []
        while True:
            replicas = self._replicas()
            one = choose(replicas, tried)
            one.breaker.begin()
            left = None if end is None else max(0.001, end - loop.time())
            try:
                response = await self._method(one)(request, timeout=left, metadata=metadata)
            except aio.AioRpcError as error:
                one.ended(error)
                tried.append(one)
                fresh = [other for other in replicas if other not in tried and other.told]
                gone = error.code() is grpc.StatusCode.UNAVAILABLE
                if not gone or not fresh or not self._budget.spend():
                    raise
                log.info("%s at %s is gone; another goes on", one.name, one.address)
                continue
            except asyncio.CancelledError:
                one.breaker.gave_up()
                raise
            one.ended(None)
            return response
