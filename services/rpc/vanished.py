"""Callers that vanish just as they are answered: no fault of ours, and no error in the log."""

from __future__ import annotations

import logging

from grpc import aio

log = logging.getLogger(__name__)

# Where gRPC logs what a handler has raised, and what comes of sending its answer.
_GRPC_LOG = "grpc._cython.cygrpc"
# So begins a batch that gRPC took and could not carry out, because the call was over. Batches
# that it did not take ("Failed grpc_call_start_batch") are mistakes of ours.
_CALL_WAS_OVER = 'Failed "execute_batch"'


class _Vanished(logging.Filter):
    """Leaves out the tracebacks of answers and refusals that nobody was there to take.

    gRPC itself leaves them out where it has been told of the caller's end before the failure. An
    interceptor could not: most answers are sent after the handler has returned.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, aio.InternalError) and str(error).startswith(_CALL_WAS_OVER):
            log.debug("a caller was gone before its answer")
            return False
        return True


_FILTER = _Vanished()


def expect_callers_to_vanish() -> None:
    """Makes it no error in the log of this process; calling it again changes nothing."""
    logging.getLogger(_GRPC_LOG).addFilter(_FILTER)
