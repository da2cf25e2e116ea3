"""`python -m tests.bench.handler PORT FILE`: the least that a server of answers can do.

A Starlette route under uvicorn, the gateway's own server, which parses the question and writes
the JSON of FILE anew for each: no checks, no caches, no models.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

answer = json.loads(Path(sys.argv[2]).read_text())


async def ask(request: Request) -> JSONResponse:
    """The same answer to every question that is JSON."""
    await request.json()
    return JSONResponse(answer)


if __name__ == "__main__":
    routes = [Route("/v1/qa", ask, methods=["POST"])]
    uvicorn.run(
        Starlette(routes=routes),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        access_log=False,
        log_level="warning",
    )
