"""`python -m tests.bench.served ENGINE MODEL KEPT PORT …`: an engine behind LitServe.

A peer as one would build it by hand: dynamic batching, tokenisation and the reading of spans in
the workers. How many workers share the cores is tried out by the caller.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import litserve

from tests.bench.answering import Answerer


class QuestionApi(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
    """POST /predict with question and context."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(max_batch_size=options.batch, batch_timeout=options.batch_seconds)
        self._options = options

    def setup(self, device: str) -> None:
        """Loads the engine in the worker."""
        options = self._options
        self._answerer = Answerer(options.engine, options.model, options.kept, options.threads)

    def decode_request(self, request: dict[str, str]) -> dict[str, str]:
        """The body as it is."""
        return request

    def predict(self, bodies: Sequence[dict[str, str]]) -> list[str]:
        """A batch's answers."""
        return self._answerer.answers(bodies, self._options.batch)

    def encode_response(self, output: str) -> dict[str, Any]:
        """The best span."""
        return {"answers": [{"text": output}]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("model", type=Path)
    parser.add_argument("kept", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="of one worker; 0: all cores")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batch-seconds", type=float, default=0.005)
    chosen = parser.parse_args()
    server = litserve.LitServer(
        QuestionApi(chosen), accelerator="cpu", workers_per_device=chosen.workers
    )
    server.run(host="127.0.0.1", port=chosen.port, generate_client_file=False)
