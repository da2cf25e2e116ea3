"""From a path to its endpoint."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Match, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send


class Routing:
    """ASGI app. Paths without parameters are looked up; for others Starlette tries the routes.

    Its router would also put every endpoint into closures that watch for errors. All errors are
    raised, `HTTPException`s for what is not served among them.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        """Of routes with equal paths the first one counts. Endpoints are `async` functions."""
        self._all = tuple(routes)
        self._others: ASGIApp = Router(routes, redirect_slashes=False)
        self._routes = {
            (method, route.path): route
            for route in reversed(routes)
            if not route.param_convertors
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        route = self._routes.get((scope["method"], scope["path"]))
        if route is None:
            await self._other(scope, receive, send)
            return
        scope["endpoint"], scope["path_params"] = route.endpoint, {}
        response = await route.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._others(scope, receive, send)
        except HTTPException as error:
            if error.status_code != 405:
                raise
            # Starlette names those of the first route of a path only.
            fitting = [one for one in self._all if one.matches(scope)[0] is not Match.NONE]
            methods = {method for one in fitting for method in one.methods or ()}
            raise HTTPException(405, headers={"Allow": ", ".join(sorted(methods))}) from None
