"""ExplainService: explanations between stages and their callers (see `miaotui.explain`)."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from typing import Any, NoReturn, TypeVar

import grpc
import numpy as np
import torch
from grpc import aio

from miaotui.engine.scheduler import QueueFullError
from miaotui.engine.tensors import TensorFormatError, from_wire, to_wire
from miaotui.explain.quadrature import DEFAULT_MAX_POINTS
from miaotui.explain.runner import (
    Activations,
    Attention,
    Explained,
    Explainer,
    Gradients,
    Share,
)
from miaotui.explain.stage import ExplainedWindow, ExplainStage, Target
from miaotui.models.errors import BatchError, UnsupportedModelError
from miaotui.models.stage import StageModel
from miaotui.v1 import explain_pb2 as pb
from miaotui.v1 import explain_pb2_grpc
from miaotui.v1.tensor_pb2 import TensorHeader
from services.rpc.channel import call, open_channel
from services.shard.convert import DTYPE_NAMES, DTYPES
from services.shard.stage import Stage

SERVICE = "miaotui.v1.ExplainService"
T = TypeVar("T")
Context = aio.ServicerContext[Any, Any]

_CODE = grpc.StatusCode
# Elsewhere than at stage 0, passes of one explanation come two at a time.
_PASSES_AT_ONCE = 2
_LEAST_POINTS = 9
_MOST_CHANNELS = 16


class _RefusedError(Exception):
    """Ends a call with a status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class NextStage:
    """The next stage as `miaotui.explain.runner.Downstream`, for one request."""

    def __init__(
        self,
        stub: explain_pb2_grpc.ExplainServiceAsyncStub,
        index: int,
        fingerprint: str,
        further: Sequence[str],
        request_id: str,
        deadline: float | None,
    ) -> None:
        """`further`: host:port of the stages after that one; `deadline`: on the monotonic clock."""
        self._stub = stub
        self._index = index
        self._fingerprint = fingerprint
        self._further = further
        self._request_id = request_id
        self._deadline = deadline

    async def differentiate(self, activations: Activations) -> Gradients:
        """Runs them on, and returns their gradients."""
        request = pb.DifferentiateRequest(activations=self._sent(activations))
        reply = await call(
            self._stub.Differentiate,
            request,
            name=f"{SERVICE}/Differentiate",
            timeout=self._left(),
        )
        gradient = _tensor(reply.gradient, reply.payload)
        logits = torch.from_numpy(np.frombuffer(reply.logits, "<f8").copy())
        return Gradients(gradient, logits, [_share(share) for share in reply.stages])

    async def attend(self, activations: Activations) -> Attention:
        """Runs one point on, and returns the attention."""
        request = pb.AttendRequest(activations=self._sent(activations))
        reply = await call(
            self._stub.Attend, request, name=f"{SERVICE}/Attend", timeout=self._left()
        )
        shape = (reply.layers, reply.heads, len(activations.hidden))
        return Attention(
            rows=from_wire(reply.attention, "float32", shape),
            rollout=from_wire(reply.rollout, "float32", shape[2:]),
            logit=reply.logit,
            shares=[_share(share) for share in reply.stages],
        )

    def _sent(self, activations: Activations) -> pb.Activations:
        wire = to_wire(activations.hidden)
        return pb.Activations(
            request_id=self._request_id,
            model_fingerprint=self._fingerprint,
            stage=self._index,
            points=activations.points,
            first=activations.target.first,
            last=activations.target.last,
            hidden=TensorHeader(dtype=DTYPES[wire.dtype], shape=wire.shape),
            payload=bytes(wire.data),
            route=self._further,
        )

    def _left(self) -> float | None:
        return None if self._deadline is None else max(0.001, self._deadline - time.monotonic())


class Channels:
    """Channels of explanations' own to other stages, opened when they are first needed."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, aio.Channel] = OrderedDict()

    def stub(self, address: str) -> explain_pb2_grpc.ExplainServiceAsyncStub:
        """The methods of the stage at host:port."""
        channel = self._open.get(address)
        if channel is None:
            channel = self._open[address] = open_channel(address)
        self._open.move_to_end(address)
        return explain_pb2_grpc.ExplainServiceStub(channel)

    async def trim(self) -> None:
        """Closes those that have not been used for longest, beyond a few."""
        while len(self._open) > _MOST_CHANNELS:
            _, channel = self._open.popitem(last=False)
            await channel.close()

    async def close(self) -> None:
        """Closes all."""
        while self._open:
            await self._open.popitem()[1].close()


class ExplainServicer(explain_pb2_grpc.ExplainServiceServicer):
    """Transport only; the work is `miaotui.explain`'s. `model`: None where it writes text."""

    def __init__(self, stage: Stage, model: StageModel | None) -> None:
        self._stage = stage
        info = stage.info
        self._channels = Channels()
        self._explainer: Explainer | None = None
        self._reason = "this model writes text; only answers marked in a passage are explained"
        if model is not None:
            at_once = 1 if stage.is_head else _PASSES_AT_ONCE
            try:
                self._explainer = Explainer(ExplainStage(model), info.index, at_once=at_once)
            except UnsupportedModelError as error:
                self._reason = str(error)

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        """Stage 0: explains a span."""
        return await self._answered(context, self._explain(request, context))

    async def Differentiate(
        self, request: pb.DifferentiateRequest, context: Context
    ) -> pb.DifferentiateResponse:
        """Other stages: gradients of activations."""
        return await self._answered(context, self._differentiate(request.activations, context))

    async def Attend(self, request: pb.AttendRequest, context: Context) -> pb.AttendResponse:
        """Other stages: attention of the layers from here on."""
        return await self._answered(context, self._attend(request.activations, context))

    async def close(self) -> None:
        """Ends the thread and the link."""
        if self._explainer is not None:
            self._explainer.close()
        await self._channels.close()

    async def _explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        explainer = self._checked(request.model_fingerprint, 0)
        window = _window(request)
        if request.max_points and not _LEAST_POINTS <= request.max_points <= DEFAULT_MAX_POINTS:
            raise _RefusedError(
                _CODE.INVALID_ARGUMENT,
                f"max_points: {request.max_points}; from {_LEAST_POINTS} to {DEFAULT_MAX_POINTS}",
            )
        left = context.time_remaining()
        done = await explainer.explain(
            window,
            Target(request.first, request.last),
            self._downstream(request.request_id, route_of(self._stage), context),
            max_points=request.max_points,
            deadline=None if left is None else time.monotonic() + left,
        )
        return _explained(done)

    async def _differentiate(
        self, sent: pb.Activations, context: Context
    ) -> pb.DifferentiateResponse:
        explainer, activations = self._received(sent)
        downstream = self._downstream(sent.request_id, sent.route, context)
        found = await explainer.differentiate(activations, downstream)
        wire = to_wire(found.hidden)
        return pb.DifferentiateResponse(
            gradient=TensorHeader(dtype=DTYPES[wire.dtype], shape=wire.shape),
            payload=bytes(wire.data),
            logits=found.logits.numpy().astype("<f8").tobytes(),
            stages=[_share_sent(share) for share in found.shares],
        )

    async def _attend(self, sent: pb.Activations, context: Context) -> pb.AttendResponse:
        explainer, activations = self._received(sent)
        downstream = self._downstream(sent.request_id, sent.route, context)
        found = await explainer.attend(activations, downstream)
        layers, heads, _ = found.rows.shape
        return pb.AttendResponse(
            attention=bytes(to_wire(found.rows).data),
            layers=layers,
            heads=heads,
            rollout=bytes(to_wire(found.rollout).data),
            logit=found.logit,
            stages=[_share_sent(share) for share in found.shares],
        )

    def _downstream(
        self, request_id: str, route: Sequence[str], context: Context
    ) -> NextStage | None:
        info = self._stage.info
        if self._stage.is_last:
            return None
        if len(route) != info.stages - 1 - info.index:
            raise _RefusedError(
                _CODE.UNAVAILABLE,
                f"stage {info.index}: the stages after this one are not connected (yet)",
            )
        left = context.time_remaining()
        return NextStage(
            self._channels.stub(route[0]),
            info.index + 1,
            info.model_fingerprint,
            route[1:],
            request_id,
            None if left is None else time.monotonic() + left,
        )

    def _received(self, sent: pb.Activations) -> tuple[Explainer, Activations]:
        explainer = self._checked(sent.model_fingerprint, sent.stage)
        if sent.stage == 0:
            raise _RefusedError(_CODE.FAILED_PRECONDITION, "stage 0 takes windows; ask Explain")
        hidden = _tensor(sent.hidden, sent.payload)
        if hidden.dim() != 2 or hidden.dtype is not torch.float32:
            raise BatchError(f"hidden: {hidden.dtype} {list(hidden.shape)}; float32 rows are taken")
        return explainer, Activations(hidden, sent.points, Target(sent.first, sent.last))

    def _checked(self, fingerprint: str, index: int) -> Explainer:
        """The explainer, where the stage serves and is the one that is meant."""
        stage, info = self._stage, self._stage.info
        if self._explainer is None:
            raise _RefusedError(_CODE.UNIMPLEMENTED, self._reason)
        if index != info.index:
            raise _RefusedError(
                _CODE.FAILED_PRECONDITION, f"this is stage {info.index}, and {index} is asked for"
            )
        if fingerprint != info.model_fingerprint:
            raise _RefusedError(
                _CODE.FAILED_PRECONDITION,
                f"this stage holds another model than the one that is asked about "
                f"({info.model_fingerprint[:12]}); ask the question again",
            )
        if stage.draining:
            raise _RefusedError(_CODE.UNAVAILABLE, "shutting down; try again elsewhere")
        return self._explainer

    async def _answered(self, context: Context, work: Awaitable[T]) -> T:
        try:
            return await work
        except _RefusedError as error:
            await self._abort(context, error.code, str(error))
        except QueueFullError as error:
            await self._abort(context, _CODE.RESOURCE_EXHAUSTED, str(error))
        except (BatchError, TensorFormatError) as error:
            await self._abort(context, _CODE.INVALID_ARGUMENT, str(error))
        except aio.AioRpcError as error:
            # The next stage's: its words come from the services, and hold nothing of the text.
            code = error.code()
            if code is _CODE.FAILED_PRECONDITION:
                code = _CODE.UNAVAILABLE  # it was replaced, and the ring will see that soon
            details = error.details() or code.name
            if not details.startswith("stage "):
                details = f"stage {self._stage.info.index + 1}: {details}"
            await self._abort(context, code, details)
        finally:
            await self._channels.trim()

    @staticmethod
    async def _abort(context: Context, code: grpc.StatusCode, message: str) -> NoReturn:
        await context.abort(code, message)


def route_of(stage: Stage) -> list[str]:
    """host:port of the stages after stage 0, as these have been verified; empty: not yet."""
    return [info.address for info in stage.pipeline[1:]]


def add_to(server: aio.Server, servicer: ExplainServicer) -> None:
    """Registers the service."""
    explain_pb2_grpc.add_ExplainServiceServicer_to_server(servicer, server)


def _window(request: pb.ExplainRequest) -> ExplainedWindow:
    raw, types = request.input_ids, request.token_type_ids
    if not raw or len(raw) % 4:
        raise BatchError(f"input_ids: {len(raw)} bytes; int32 ids take 4 each, at least one")
    ids = np.frombuffer(raw, "<i4").astype(np.int64)
    for name, flags in (("token_type_ids", types), ("replaced", request.replaced)):
        if len(flags) != len(ids) and (flags or name == "replaced"):
            raise BatchError(f"{name}: {len(flags)} bytes for {len(ids)} tokens; one a token")
    return ExplainedWindow(
        torch.from_numpy(ids),
        torch.from_numpy(np.frombuffer(types, np.uint8).astype(np.int64)) if types else None,
        torch.from_numpy(np.frombuffer(request.replaced, np.uint8) != 0),
    )


def _tensor(header: TensorHeader, payload: bytes) -> torch.Tensor:
    dtype = DTYPE_NAMES.get(header.dtype)
    if dtype is None:
        raise TensorFormatError(f"dtype {header.dtype} is none that travels")
    return from_wire(payload, dtype, header.shape)


def _explained(done: Explained) -> pb.ExplainResponse:
    layers, heads, _ = done.attention.rows.shape
    integral = done.integral
    return pb.ExplainResponse(
        attribution=done.attribution.numpy().astype("<f4").tobytes(),
        rollout=bytes(to_wire(done.attention.rollout).data),
        attention=bytes(to_wire(done.attention.rows).data),
        layers=layers,
        heads=heads,
        logit=integral.end,
        baseline_logit=integral.start,
        points=len(integral.points),
        gap=integral.gap,
        stages=[_share_sent(share) for share in done.shares],
    )


def _share_sent(share: Share) -> pb.ExplainShare:
    return pb.ExplainShare(
        stage=share.stage,
        compute_micros=int(share.seconds * 1e6),
        first_layer=share.first_layer,
        end_layer=share.end_layer,
        tokens=share.tokens,
        link_bytes=share.link_bytes,
    )


def _share(sent: pb.ExplainShare) -> Share:
    return Share(
        stage=sent.stage,
        first_layer=sent.first_layer,
        end_layer=sent.end_layer,
        seconds=sent.compute_micros / 1e6,
        tokens=sent.tokens,
        link_bytes=sent.link_bytes,
    )
