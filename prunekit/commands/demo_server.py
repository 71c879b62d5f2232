"""The web server of ``prunekit demo``: a page, samples, and an address that takes pictures. Needs the extra ``demo``.

It reads no file and writes none. Pages of other sites get no answer, whatever name they use for this machine.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from prunekit.errors import PrunekitError

MAX_BYTES = 25 * 10**6  # of a picture; cameras write less
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def make_app(
    page: str, predict: Callable[[bytes], dict[str, Any]], samples: Sequence[bytes] = (), names: Collection[str] = ()
) -> Starlette:
    """Return the application.

    Args:
        page: HTML that is answered at ``/``.
        predict: called in a thread, for one picture at a time, with the bytes of a file that is posted to
            ``/predict``; what it returns is answered as JSON, and the message of a PrunekitError as ``error``.
        samples: PNG files that are answered at ``/samples/0`` and so on.
        names: names of this machine that browsers may use, beside ``localhost`` and addresses.
    """
    turn = threading.Lock()

    def predict_in_turn(data: bytes) -> dict[str, Any]:
        with turn:
            return predict(data)

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page)

    async def show_sample(request: Request) -> Response:
        index = request.path_params["index"]
        return Response(samples[index], media_type="image/png") if index < len(samples) else Response(status_code=404)

    async def apply(request: Request) -> Response:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_BYTES:
                return _refusal(413, f"this file has more than {MAX_BYTES // 10**6} MB; choose a smaller picture")
        return JSONResponse(await run_in_threadpool(predict_in_turn, bytes(data)))

    async def guard(request: Request, call_next: RequestResponseEndpoint) -> Response:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not is_own_host(host, names):
            response = _refusal(403, f"{host or 'a request without Host'} is not this server; use its address")
        elif origin is not None and urlsplit(origin).netloc != host:
            response = _refusal(403, f"{origin} is another site; open the page of this server")
        else:
            response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    return Starlette(
        routes=[
            Route("/", show_page),
            Route("/samples/{index:int}", show_sample),
            Route("/predict", apply, methods=["POST"]),
        ],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)],
        exception_handlers={
            PrunekitError: lambda _, error: _refusal(422, str(error)),
            ClientDisconnect: lambda _, error: Response(),  # nobody reads it
        },
    )


def is_own_host(header: str, names: Collection[str] = ()) -> bool:
    """Return whether a ``Host`` header is an address, ``localhost`` or one of ``names``, with any port.

    A site that lets its own name lead to this machine (DNS rebinding) cannot make a browser send an address.
    """
    try:
        host = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host in {name.lower() for name in names}
    return True


def run_server(app: Starlette, listener: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM, which raises KeyboardInterrupt after the open requests have ended."""
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=3)
    uvicorn.Server(config).run(sockets=[listener])


def _refusal(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status)
