"""OpenTelemetry's TraceService on the gateway's gRPC port: the other services' spans."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb

from gateway.live.traces import TraceRing, add_exported

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
_HERE = ("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:")


class TraceCollector:
    """Keeps what is exported to it in the ring."""

    def __init__(self, ring: TraceRing, *, from_anywhere: bool = True) -> None:
        """Without `from_anywhere`, only processes of this machine may export."""
        self._ring = ring
        self._from_anywhere = from_anywhere

    def add_to(self, server: aio.Server) -> None:
        """Registers the service's method."""
        # Bytes, because gRPC answers INTERNAL and logs a traceback where it cannot read them.
        export: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(
            self.Export,
            request_deserializer=None,
            response_serializer=pb.ExportTraceServiceResponse.SerializeToString,
        )
        handler = grpc.method_handlers_generic_handler(SERVICE, {"Export": export})
        server.add_generic_rpc_handlers((handler,))

    async def Export(
        self, data: bytes, context: aio.ServicerContext[Any, Any]
    ) -> pb.ExportTraceServiceResponse:
        """Keeps spans."""
        if not (self._from_anywhere or context.peer().startswith(_HERE)):
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                "Where API keys are asked for, traces are taken from this machine alone, or "
                "over mutual TLS.",
            )
        try:
            request = pb.ExportTraceServiceRequest.FromString(data)
        except DecodeError:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                "The bytes are no ExportTraceServiceRequest, or its text is no UTF-8.",
            )
        add_exported(self._ring, request.resource_spans)
        return pb.ExportTraceServiceResponse()
