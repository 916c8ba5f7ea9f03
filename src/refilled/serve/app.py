"""The web application: a page, predictions as JSON, and limits on requests."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from refilled.serve.description import openapi
from refilled.serve.engine import Engine, Refusal
from refilled.serve.queue import BatchQueue, Full

MAX_FILES = 64
"""Maximum number of pictures per request."""

_BATCH = 32
_WAITING = 4  # requests of the largest size that may wait
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_PAGE = {
    "page.html": ("/", "text/html; charset=utf-8"),
    "page.css": ("/page.css", "text/css; charset=utf-8"),
    "page.js": ("/page.js", "text/javascript; charset=utf-8"),
}


def make_app(engine: Engine, max_bytes: int, host: str = "127.0.0.1") -> Starlette:
    """Return the application.

    Args:
        engine: The student that answers the requests.
        max_bytes: Maximum size of a request in bytes, with all its pictures.
        host: Address of the server. At a loopback address, requests for other host names are refused, so that no web
            page can reach the server by DNS rebinding.
    """
    queue: BatchQueue[dict[str, Any] | Refusal] = BatchQueue(engine.answer, _BATCH, _WAITING * max_bytes)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        queue.begin()
        yield
        await queue.end()

    async def predict(request: Request) -> Response:
        top = _whole_number(request.query_params.get("top"), len(engine.classes))
        pictures = await _pictures_of(request, max_bytes)
        try:
            answers = await asyncio.gather(*(queue.ask(picture) for _, picture in pictures))
        except Full:
            raise HTTPException(503, "too many pictures are waiting; try again", {"Retry-After": "1"}) from None
        described = [
            {"name": name, "error": answer.reason, "status": answer.status}
            if isinstance(answer, Refusal)
            else {"name": name, **_shortened(answer, top)}
            for (name, _), answer in zip(pictures, answers, strict=True)
        ]
        refused = [answer for answer in answers if isinstance(answer, Refusal)]
        if len(refused) == len(answers):
            content = {"error": refused[0].reason, "predictions": described}
            return JSONResponse(content, refused[0].status)
        return JSONResponse({"predictions": described})

    async def health(request: Request) -> Response:
        return JSONResponse(
            {
                "status": "ok",
                "model": engine.name,
                "classes": list(engine.classes),
                "image_size": engine.image_size,
                "nearest": engine.neighbours is not None,
                "teacher": engine.teacher is not None,
                "max_bytes": max_bytes,
                "max_pixels": engine.max_pixels,
                "notes": engine.notes,
            }
        )

    async def thumbnail(request: Request) -> Response:
        row = request.path_params["row"]
        if engine.neighbours is None or row >= len(engine.neighbours.images):
            raise HTTPException(404, "there is no such training image")
        picture = await asyncio.to_thread(engine.neighbours.thumbnail, row)
        return Response(picture, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    async def description(request: Request) -> Response:
        return JSONResponse(openapi(max_bytes, MAX_FILES))

    app = Starlette(
        routes=[
            *(_static(name, path, kind) for name, (path, kind) in _PAGE.items()),
            Route("/predict", predict, methods=["POST"]),
            Route("/health", health),
            Route("/openapi.json", description),
            Route("/thumbnails/{row:int}", thumbnail),
        ],
        exception_handlers={HTTPException: _as_json, Exception: _as_json},
        lifespan=lifespan,
    )
    app.add_middleware(_Guard, own_names=_names_of(host))
    return app


class _Guard:
    """Add the security headers to every response, and refuse requests for other host names."""

    def __init__(self, app: Callable[..., Awaitable[None]], own_names: frozenset[str] | None) -> None:
        self._app, self._own_names = app, own_names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = Request(scope).headers.get("host", "").lower()
        name = name.rpartition(":")[0] if name.rpartition(":")[2].isdecimal() else name
        if self._own_names is not None and name.strip("[]") not in self._own_names:
            refusal = JSONResponse(
                {"error": f"unknown host name; use one of: {', '.join(sorted(self._own_names))}"}, 400
            )
            await refusal(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _names_of(host: str) -> frozenset[str] | None:
    return frozenset({"127.0.0.1", "localhost", "::1", host}) if is_loopback(host) else None


def _static(name: str, path: str, kind: str) -> Route:
    content = (files("refilled.serve") / "page" / name).read_bytes()

    async def respond(request: Request) -> Response:
        return Response(content, headers={"Content-Type": kind})

    return Route(path, respond)


async def _as_json(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    return JSONResponse({"error": "the server failed on this request; see its log"}, 500)


def _whole_number(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not text.isdecimal() or not int(text[:9]) > 0:
        raise HTTPException(400, "top must be an integer above 0")
    return int(text[:9])


def _shortened(answer: dict[str, Any], top: int) -> dict[str, Any]:
    ranked = sorted(answer["probabilities"].items(), key=lambda item: -item[1])[:top]
    return {**answer, "probabilities": dict(ranked)}


async def _pictures_of(request: Request, max_bytes: int) -> list[tuple[str | None, bytes]]:
    """Return the names and bytes of the pictures of a request: the parts of a form, or the whole body."""
    body = await _body_of(request, max_bytes)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not kind.startswith("multipart/"):  # of any content type, because curl sets its own
        if not body:
            raise HTTPException(400, "the body is empty; send a picture, as the body or as multipart/form-data")
        return [(None, body)]

    async def stream() -> AsyncIterator[bytes]:
        yield body

    if kind != "multipart/form-data":
        raise HTTPException(415, f"{kind} is not supported; send multipart/form-data, or a picture as the body")
    try:
        form = await MultiPartParser(request.headers, stream(), max_files=MAX_FILES, max_fields=MAX_FILES).parse()  # type: ignore[arg-type]
    except (MultiPartException, KeyError) as error:
        reason = getattr(error, "message", "there is no boundary")
        raise HTTPException(400, f"the form cannot be read: {reason}") from None
    async with form_closed(form):
        parts = [part for _, part in form.multi_items() if not isinstance(part, str)]
        pictures: list[tuple[str | None, bytes]] = [(part.filename, await part.read()) for part in parts]
    if not pictures:
        raise HTTPException(400, "the form contains no file; send each picture as a file, as in curl -F picture=@a.jpg")
    return pictures


@asynccontextmanager
async def form_closed(form: Any) -> AsyncIterator[None]:
    """Remove the temporary files of a form at the end."""
    try:
        yield
    finally:
        await form.close()


async def _body_of(request: Request, max_bytes: int) -> bytes:
    """Read a body, and stop as soon as it is too large, whatever its declared length."""
    too_large = HTTPException(413, f"more than {max_bytes:,} bytes; send fewer or smaller pictures")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:18]) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise too_large
    except ClientDisconnect:
        raise HTTPException(400, "the client disconnected") from None
    return bytes(body)
