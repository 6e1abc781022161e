"""The server of `regard view`: on loopback only, for the page that it serves itself."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import RegardError
from .answers import NAMES, Answers, Asked, TilesAsked, page_of
from .first_answers import FirstAnswers
from .page_facts import page_facts
from .page_files import page_file

if TYPE_CHECKING:  # it imports torch: the page is there before that is done
    from .opened import Opened

HOST = "127.0.0.1"
HOSTS = (HOST, "localhost")
PATIENCE = 1.0
"""Seconds that importing torch waits for the first view to be asked for and answered."""
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}


class Guard:
    """Answers nobody but its own page: whoever comes from another origin is refused."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        own = f"http://{given.get('host', '')}"
        foreign = given.get("sec-fetch-site", "none") not in ("none", "same-origin")
        opened = given.get("sec-fetch-mode") == "navigate" and scope["path"] == "/"
        if given.get("origin", own) != own or (foreign and not opened):
            refused = JSONResponse({"error": "this page answers its own origin only"}, 403)
            await refused(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        await self.app(scope, receive, with_headers)


class Site:
    """The routes over some recordings: given as they are, or once `load` has opened them.

    first: what can be answered before that.
    """

    def __init__(
        self, opened: Sequence[Opened] = (), first: Sequence[FirstAnswers] | None = None
    ) -> None:
        self.first = first
        self.ended = False
        self.begun = threading.Event()  # the first view is answered: now to what takes long
        self.loaded: Future[Answers] = Future()
        if opened:
            self.loaded.set_result(Answers(opened))
        self.pool = ThreadPoolExecutor(max(2, os.cpu_count() or 2), thread_name_prefix="tile")
        self.computed = 0  # tiles, for whoever watches that those left behind are dropped

    def load(self, make: Callable[[], list[Opened]]) -> None:
        """Open recordings; what asks for them waits. The first view comes before."""
        if self.first is not None:
            self.begun.wait(PATIENCE)
        if self.ended:
            return
        try:
            self.loaded.set_result(Answers(make()))
        except BaseException as error:
            self.loaded.set_exception(error)

    @property
    def answers(self) -> Answers:
        """What answers, once the recordings are open. Raises what kept them from it."""
        return self.loaded.result()

    def app(self) -> Starlette:
        early = {"about": self.first_about, "tokens": self.first_tokens}
        routes = [
            Route("/", self.index),
            Route("/page/{path:path}", self.file),
            *(Route(f"/api/{name}", self.route(name, early.get(name))) for name in NAMES),
            Route("/api/tiles", self.tiles),
        ]
        guards = [
            Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False),
            Middleware(Guard),
        ]
        return Starlette(routes=routes, middleware=guards)

    def index(self, request: Request) -> Response:
        return _file("index.html")

    def file(self, request: Request) -> Response:
        return _file(request.path_params["path"])

    def route(
        self, name: str, early: Callable[[Asked, FirstAnswers], Any] | None
    ) -> Callable[[Request], Response]:
        """Answers with JSON, at once where it can while recordings are being opened.

        What is refused is one sentence.
        """

        def answer(request: Request) -> Response:
            given = request.query_params
            try:
                first = self.early(asked := Asked(given)) if early is not None else None
                found = early(asked, first) if early is not None and first is not None else None
                return _json(self.answers.answer(name, given) if found is None else found)
            except (RegardError, OSError) as error:
                return _refused(error)

        return answer

    def early(self, asked: Asked) -> FirstAnswers | None:
        """What answers for a recording while it is being opened; None once it is."""
        number = asked.number("r", 0)
        if self.first is None or self.loaded.done() or number >= len(self.first):
            return None
        return self.first[number] if self.first[number].there() else None

    def first_about(self, asked: Asked, first: FirstAnswers) -> Any:
        every = self.first or ()
        return page_facts([one.about for one in every], [one.sides["text"] for one in every])

    def first_tokens(self, asked: Asked, first: FirstAnswers) -> Any:
        side = asked.one_of("side", "text", "decoder", "words")
        return None if side == "words" else page_of(first.sides[side], asked.number("page", 0))

    async def tiles(self, request: Request) -> Response:
        """Tiles one after another, each 65,536 bytes: sent when it is computed.

        Whoever goes away stops the work: this generator is cancelled, and computes no further.
        """
        try:
            wanted = TilesAsked.of(asked := Asked(request.query_params))
            if (data := self.first_tile(asked, wanted)) is not None:
                return Response(data, media_type="application/octet-stream")
            await asyncio.wrap_future(self.loaded)
            tiles = self.answers.tiles(request.query_params)
        except (RegardError, OSError) as error:
            return _refused(error)

        def one() -> bytes:
            self.computed += 1
            return next(tiles, b"")

        loop = asyncio.get_running_loop()
        try:
            begun = await loop.run_in_executor(self.pool, one)
        except (RegardError, OSError) as error:
            return _refused(error)

        async def stream() -> AsyncIterator[bytes]:
            yield begun
            for _ in wanted.places[1:]:
                try:
                    yield await loop.run_in_executor(self.pool, one)
                except (RegardError, OSError):
                    return  # the page asks for what is missing, and is told then

        return StreamingResponse(stream(), media_type="application/octet-stream")

    def first_tile(self, asked: Asked, wanted: TilesAsked) -> bytes | None:
        """A tile of the first view, from the files alone; then the recordings may be opened."""
        plain = wanted.sinks and len(wanted.places) == 1
        first = self.early(asked) if plain else None
        if first is None:
            return None
        tile = (wanted.head, wanted.zoom, *wanted.places[0])
        found = first.tile(wanted.layer, tile, wanted.reduce, wanted.batch, wanted.by)
        self.begun.set()
        return found


def _file(path: str) -> Response:
    """A file of the page; nothing beside the page's folders is ever read."""
    name = PurePosixPath(path)
    kind = _KINDS.get(name.suffix)
    plain = all(part not in ("", ".", "..") and "\\" not in part for part in path.split("/"))
    if kind is None or len(path) > 200 or not plain or name.is_absolute():
        return _json({"error": "no such file"}, 404)
    found = page_file(path)
    if found is None:
        return _json({"error": "no such file"}, 404)
    return Response(found.read_bytes(), media_type=kind)


def _json(value: Any, status: int = 200) -> Response:
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Response(text, status, media_type="application/json")


def _refused(error: Exception) -> Response:
    return _json({"error": " ".join(str(error).split())}, 422)


def listen(port: int) -> socket.socket:
    """A socket on loopback, at this port, or at a free one for 0."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((HOST, port))
    except (OSError, OverflowError) as error:
        sock.close()
        said = getattr(error, "strerror", None) or error
        raise RegardError(f"cannot listen on port {port}: {said}; leave --port out") from error
    sock.listen(128)
    return sock


def server(site: Site) -> uvicorn.Server:
    """What answers for a site, once it is run on a socket."""
    config = uvicorn.Config(
        site.app(), log_level="error", access_log=False, lifespan="off", ws="none",
        server_header=False, date_header=False, timeout_graceful_shutdown=1, http="h11",
    )  # fmt: skip
    return uvicorn.Server(config)


def serve(
    make: Callable[[], list[Opened]],
    sock: socket.socket,
    first: Sequence[FirstAnswers] | None = None,
) -> None:
    """Answer until interrupted, the page at once, the rest when `make` has opened the recordings.

    first: what answers until then. Raises what kept them from being opened, and ends.
    """
    site = Site(first=first)
    runs = server(site)

    def failed(loaded: Future[Answers]) -> None:
        runs.should_exit = loaded.exception() is not None

    site.loaded.add_done_callback(failed)
    site.pool.submit(site.load, make)
    try:
        runs.run(sockets=[sock])
    except KeyboardInterrupt:  # uvicorn raises again what it has handled
        pass
    finally:
        site.ended = True
        site.begun.set()
        site.pool.shutdown(wait=False, cancel_futures=True)
    if site.loaded.done():
        site.loaded.result()
