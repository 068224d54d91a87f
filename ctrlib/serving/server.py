"""A trained model behind HTTP, on Starlette and uvicorn: `ctrlib serve`.

| request | answer |
| --- | --- |
| `POST /predict` | probabilities of rows, and what was unseen or missing in them |
| `POST /rank` | the best of many candidates for one user |
| `GET /`, `GET /model` | labels, columns, and the hash of the schema |
| `GET /health` | 200, or 503 when the server is about to end |
| `GET /metrics` | counts and times, in Prometheus' text form |

What is refused is answered with a status from 400 on and `{"error": ...}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ctrlib.errors import ArgumentError, CtrlibError, check_whole
from ctrlib.serving.candidates import Items
from ctrlib.serving.predictor import Predictor
from ctrlib.serving.requests import Limits, RefusedError, described, predict, rank
from ctrlib.serving.scoring import Read, Scorer

# Seconds after which a thread gives way that holds Python's lock, a tenth of the usual: the model's thread asks for it
# again after each operation, and the loop for each request, while another reads a thousand cells.
SWITCH = 0.0005
PATHS = ("/", "/model", "/health", "/metrics", "/predict", "/rank")
# Upper ends of the bars of the histogram of seconds.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def application(predictor: Predictor, limits: Limits | None = None, items: Items | None = None) -> Starlette:
    """The server of a model, for uvicorn or any other that speaks ASGI on asyncio; its `state.service` is a `Service`.

    Args:
        predictor: of the model.
        limits: what it takes.
        items: of which requests to rank may give the keys instead of rows (`Predictor.items`).
    """
    service = Service(predictor, limits or Limits(), items)
    get, post = ["GET"], ["POST"]
    app = Starlette(
        routes=[
            Route("/", service.model, methods=get),
            Route("/model", service.model, methods=get),
            Route("/health", service.health, methods=get),
            Route("/metrics", service.metrics, methods=get),
            Route("/predict", service.predict, methods=post),
            Route("/rank", service.rank, methods=post),
        ],
        middleware=[Middleware(_Counted, service=service)],
        exception_handlers={RefusedError: _refused, HTTPException: _of_http, Exception: _fault},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


class Service:
    """What answers the requests of one server.

    Args:
        predictor: of the model; it is used once, so that nobody waits for what is made at first use.
        limits: what is taken.
        items: as in `application`.
    """

    def __init__(self, predictor: Predictor, limits: Limits, items: Items | None = None) -> None:
        self.predictor, self.limits = predictor, limits
        self._rank = functools.partial(rank, known=items)
        self.draining = False
        self.requests: Counter[tuple[str, int]] = Counter()  # path, status
        self.seconds: dict[str, list[float]] = {}  # path -> number in each bar, that beyond all, and the sum
        self._held = 0
        row = dict.fromkeys(predictor.encoder.inputs)
        with contextlib.suppress(CtrlibError):  # of a model that reads a log, a row must have a time
            predictor.score_encoded([predictor.encode(row)[0]])
        predictor.encoder.make_ready()
        self._described = described(predictor, limits)
        self.scorer = Scorer(predictor, limits)

    def close(self) -> None:
        """Answer what waits, and end the thread that scores."""
        self.scorer.close()

    async def predict(self, request: Request) -> Response:
        """`POST /predict`."""
        return await self._scored(predict, request)

    async def rank(self, request: Request) -> Response:
        """`POST /rank`."""
        return await self._scored(self._rank, request)

    async def model(self, request: Request) -> Response:
        """`GET /model`."""
        return _json(200, self._described)

    async def health(self, request: Request) -> Response:
        """`GET /health`."""
        return _json(503, {"status": "draining"}) if self.draining else _json(200, {"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`."""
        return PlainTextResponse(self._exposed(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _scored(self, read: Read, request: Request) -> Response:
        self._check_head(request)
        try:
            body = await self._body(request)
        except ClientDisconnect:
            return Response(status_code=400)  # which nobody receives
        try:
            answer = await asyncio.wrap_future(self.scorer.submit(read, body))
        finally:
            self._held -= len(body)
        return Response(answer, media_type="application/json")

    def _check_head(self, request: Request) -> None:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RefusedError(f"the content is {kind or 'of no type'}: send Content-Type: application/json", 415)
        if (coding := request.headers.get("content-encoding", "identity")) != "identity":
            raise RefusedError(f"the content is coded ({coding}): send it as it is, without Content-Encoding", 415)
        # That it is a number, HTTP's parser has seen to; where none is given, bytes are counted as they come.
        if (length := request.headers.get("content-length", "")).isdecimal() and int(length) > self.limits.body:
            raise self._too_long()

    async def _body(self, request: Request) -> bytes:
        """What was sent; it counts among the bytes that are held until it is answered."""
        parts, size, whole = [], 0, False
        try:
            with anyio.fail_after(self.limits.seconds):
                async for part in request.stream():
                    size += len(part)
                    self._held += len(part)
                    if size > self.limits.body:
                        raise self._too_long()
                    if self._held > self.limits.held:
                        raise RefusedError("too many bytes are being received: ask again in a second", 503)
                    parts.append(part)
            whole = True
        except TimeoutError:
            raise RefusedError(f"the body did not come within {self.limits.seconds} seconds", 408) from None
        finally:
            if not whole:
                self._held -= size
        return b"".join(parts)

    def _too_long(self) -> RefusedError:
        return RefusedError(f"the body has more than {self.limits.body:,} bytes: send rows in several requests", 413)

    def count(self, path: str, status: int, seconds: float) -> None:
        """Note a request that was answered."""
        path = path if path in PATHS else "other"
        self.requests[path, status] += 1
        bars = self.seconds.setdefault(path, [0.0] * (len(SECONDS) + 2))
        bars[next((place for place, end in enumerate(SECONDS) if seconds <= end), len(SECONDS))] += 1
        bars[-1] += seconds

    def _exposed(self) -> str:
        lines: list[str] = []

        def family(name: str, kind: str, help: str) -> None:
            lines.extend([f"# HELP ctrlib_{name} {help}", f"# TYPE ctrlib_{name} {kind}"])

        family("requests_total", "counter", "Requests answered.")
        for (path, status), number in sorted(self.requests.items()):
            lines.append(f'ctrlib_requests_total{{path="{path}",status="{status}"}} {number}')
        family("request_seconds", "histogram", "From a request's head to its answer.")
        for path, bars in sorted(self.seconds.items()):
            number = 0
            for end, some in zip((*SECONDS, "+Inf"), bars):
                number += int(some)
                lines.append(f'ctrlib_request_seconds_bucket{{path="{path}",le="{end}"}} {number}')
            lines.append(f'ctrlib_request_seconds_sum{{path="{path}"}} {bars[-1]:.6f}')
            lines.append(f'ctrlib_request_seconds_count{{path="{path}"}} {number}')
        for name, kind, help, value in (
            ("rows_total", "counter", "Rows scored.", self.scorer.rows),
            (
                "model_calls_total",
                "counter",
                "Calls of the model, for all that waited.",
                self.scorer.calls,
            ),
            ("requests_waiting", "gauge", "Requests that wait for the model.", self.scorer.waiting),
        ):
            family(name, kind, help)
            lines.append(f"ctrlib_{name} {value}")
        family("model_info", "gauge", "The model that is served.")
        lines.append(f'ctrlib_model_info{{schema_hash="{self.predictor.schema.hash}"}} 1')
        return "\n".join(lines) + "\n"


class _Counted:
    """Counts and times each request."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            self.service.count(scope["path"], status, time.perf_counter() - started)


def _json(status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content).encode(), status, headers, "application/json")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _json(error.status, {"error": str(error)}, {"Retry-After": "1"} if error.status == 503 else None)


async def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{request.method} {request.url.path}: {error.detail}; there are POST /predict and /rank, and GET /model, "
    headers = None if error.headers is None else dict(error.headers)
    return _json(error.status_code, {"error": f"{said}/health and /metrics"}, headers)


async def _fault(request: Request, error: Exception) -> Response:
    return _json(500, {"error": f"the server failed at this request ({type(error).__name__}); its log says more"})


class _Server(uvicorn.Server):
    """uvicorn's, whose end by a signal is a good one: what is at work is answered, and the signal is not raised again.

    Args:
        config: uvicorn's.
        service: is told that it drains.
        started: is called when connections are taken.
    """

    def __init__(self, config: uvicorn.Config, service: Service, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._announce = service, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.draining = True
        self.force_exit = self.should_exit and sig == signal.SIGINT  # somebody at the keyboard who asks twice
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, on which nobody listens yet; port 0 is any that is free.

    Raises:
        ArgumentError: it is taken, or no address of this machine.
    """
    check_whole(0, port=port)
    if port > 65535:  # the system would take the rest
        raise ArgumentError(f"port (--port) must be below 65536, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise ArgumentError(
            f"port {port} of {host} cannot be had ({said}): give another --port, such as 0 for any that is free, or "
            "another --host"
        ) from error
    return bound


def serve(
    predictor: Predictor,
    bound: socket.socket,
    limits: Limits | None = None,
    *,
    items: Items | None = None,
    grace: int = 20,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C comes; then take no new ones, answer those at work, and return.

    Args:
        predictor: of the model.
        bound: as `bind` gives it.
        limits: what is taken.
        items: as in `application`.
        grace: seconds after which requests that are still at work are cut off.
        started: is called when connections are taken.

    Raises:
        ArgumentError: `grace` is below 1.
    """
    check_whole(1, grace=grace)
    app = application(predictor, limits, items)
    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=grace,
    )
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    gc.collect()
    gc.freeze()  # what is there stays, and is not to be looked through while requests wait
    try:
        _Server(config, app.state.service, started).run([bound])
    finally:
        gc.unfreeze()
        sys.setswitchinterval(interval)
        app.state.service.close()
