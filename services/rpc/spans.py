"""Spans of the services behind a gateway, sent to it where no collector is set up."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import grpc
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from miaotui.telemetry import Spans
from services.rpc.tls import blocking_channel

log = logging.getLogger(__name__)

_EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_SECONDS = 1.0


class GatewaySpanExporter(SpanExporter):
    """Sends spans to a gateway over OTLP; those that it does not take are gone.

    OpenTelemetry's own exporter would retry and complain in the log, and a service must stop
    without delay when the gateway has stopped before it.
    """

    def __init__(self, target: str) -> None:
        """`target`: host:port of the gateway's gRPC port."""
        self._target = target
        self._channel: grpc.Channel | None = None

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Sends them; blocks for a second at most."""
        if self._channel is None:
            self._channel = blocking_channel(self._target)
        send = self._channel.unary_unary(
            _EXPORT,
            request_serializer=pb.ExportTraceServiceRequest.SerializeToString,
            response_deserializer=pb.ExportTraceServiceResponse.FromString,
        )
        try:
            send(encode_spans(spans), timeout=_SECONDS)
        except grpc.RpcError:
            log.debug("%d spans were not taken by %s", len(spans), self._target)
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Closes the channel."""
        if self._channel is not None:
            self._channel.close()


def spans_to(target: str) -> Spans | None:
    """Where spans go: to the gateway at `target`; nowhere where that is empty."""
    return Spans(exporter=GatewaySpanExporter(target)) if target else None
