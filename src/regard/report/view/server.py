"""The server of `regard view`: on loopback only, for the page that it serves itself."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.resources import files
from importlib.resources.abc import Traversable
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
from .first_answers import FirstAnswers
from .page_facts import PAGE, page_facts

if TYPE_CHECKING:  # it imports torch: the page is there before that is done
    from .opened import Opened

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
PATIENCE = 1.0
"""Seconds that importing torch waits for the first view to be asked for and answered."""
TILES = 64
"""Tiles that one request may ask for."""
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


class _Asked:
    """The numbers and words of a request's query, checked."""

    def __init__(self, request: Request) -> None:
        self._given = request.query_params

    def number(self, name: str, default: int | None = None) -> int:
        text = self._given.get(name, "" if default is None else str(default))
        if not text.isascii() or not text.isdecimal() or len(text) > 12:
            raise RegardError(f"{name}: a whole number from 0 on is wanted")
        return int(text)

    def one_of(self, name: str, *choices: str) -> str:
        text = self._given.get(name, choices[0])
        if text not in choices:
            raise RegardError(f"{name}: one of {', '.join(choices)} is wanted")
        return text

    def word(self, name: str) -> str:
        return self._given.get(name, "")[:1000]

    def places(self, name: str) -> list[tuple[int, int]]:
        """Rows and columns of tiles, "3.1,3.2"."""
        pairs = [pair.split(".") for pair in self._given.get(name, "").split(",")]
        fit = all(
            len(pair) == 2 and all(n.isascii() and n.isdecimal() and len(n) < 9 for n in pair)
            for pair in pairs
        )
        if not fit or len(pairs) > TILES:
            raise RegardError(f"{name}: at most {TILES} places, as 3.1,3.2, are wanted")
        return [(int(row), int(col)) for row, col in pairs]


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
        self.loaded: Future[list[Opened]] = Future()
        if opened:
            self.loaded.set_result(list(opened))
        self.pool = ThreadPoolExecutor(max(2, os.cpu_count() or 2), thread_name_prefix="tile")
        self.computed = 0  # tiles, for whoever watches that those left behind are dropped

    def load(self, make: Callable[[], list[Opened]]) -> None:
        """Open recordings; what asks for them waits. The first view comes before."""
        if self.first is not None:
            self.begun.wait(PATIENCE)
        if self.ended:
            return
        try:
            self.loaded.set_result(make())
        except BaseException as error:
            self.loaded.set_exception(error)

    @property
    def opened(self) -> list[Opened]:
        """The recordings, once they are open. Raises what kept them from it."""
        return self.loaded.result()

    def app(self) -> Starlette:
        routes = [
            Route("/", self.index),
            Route("/page/{path:path}", self.file),
            Route("/api/about", self.at_first(self.first_about, self.about)),
            Route("/api/tokens", self.at_first(self.first_tokens, self.tokens)),
            Route("/api/overview", self.answers(self.overview)),
            Route("/api/along", self.answers(self.along)),
            Route("/api/fan", self.answers(self.fan)),
            Route("/api/segments", self.answers(self.segments)),
            Route("/api/weight", self.answers(self.weight)),
            Route("/api/matching", self.answers(self.matching)),
            Route("/api/reads", self.answers(self.reads)),
            Route("/api/tiles", self.tiles),
        ]
        guards = [
            Middleware(TrustedHostMiddleware, allowed_hosts=list(NAMES), www_redirect=False),
            Middleware(Guard),
        ]
        return Starlette(routes=routes, middleware=guards)

    def index(self, request: Request) -> Response:
        return _file("index.html")

    def file(self, request: Request) -> Response:
        return _file(request.path_params["path"])

    def answers(self, make: Callable[[_Asked, Opened], Any]) -> Callable[[Request], Response]:
        """A route that answers with JSON; what is refused is one sentence."""

        def route(request: Request) -> Response:
            try:
                asked = _Asked(request)
                return _json(make(asked, self.which(asked)))
            except (RegardError, OSError) as error:
                return _refused(error)

        return route

    def which(self, asked: _Asked) -> Opened:
        number = asked.number("r", 0)
        if number >= len(self.opened):
            raise RegardError(f"no recording {number}: {len(self.opened)} are open")
        opened = self.opened[number]
        opened.check()
        return opened

    def at_first(
        self, early: Callable[[_Asked, FirstAnswers], Any], make: Callable[[_Asked, Opened], Any]
    ) -> Callable[[Request], Response]:
        """A route that answers at once, where it can, while the recordings are being opened."""
        later = self.answers(make)

        def route(request: Request) -> Response:
            try:
                found = self.early(asked := _Asked(request))
                answer = None if found is None else early(asked, found)
            except (RegardError, OSError) as error:
                return _refused(error)
            return later(request) if answer is None else _json(answer)

        return route

    def early(self, asked: _Asked) -> FirstAnswers | None:
        """What answers for a recording while it is being opened; None once it is."""
        number = asked.number("r", 0)
        if self.first is None or self.loaded.done() or number >= len(self.first):
            return None
        return self.first[number] if self.first[number].there() else None

    def first_about(self, asked: _Asked, first: FirstAnswers) -> Any:
        return page_facts([one.about for one in self.first or ()])

    def first_tokens(self, asked: _Asked, first: FirstAnswers) -> Any:
        side = asked.one_of("side", "text", "decoder", "words")
        return None if side == "words" else _page(first.sides[side], asked.number("page", 0))

    def about(self, asked: _Asked, opened: Opened) -> Any:
        return page_facts([one.about() for one in self.opened])

    def tokens(self, asked: _Asked, opened: Opened) -> Any:
        side = asked.one_of("side", "text", "decoder", "words")
        pieces = opened.words() if side == "words" else opened.pieces(side)
        return _page(pieces, asked.number("page", 0))

    def overview(self, asked: _Asked, opened: Opened) -> Any:
        return opened.overview(asked.number("layer"), asked.number("batch", 0))

    def along(self, asked: _Asked, opened: Opened) -> Any:
        what = asked.one_of("what", "entropy", "received")
        layer, head = asked.number("layer"), asked.number("head")
        return opened.along(layer, head, asked.number("batch", 0), what)

    def fan(self, asked: _Asked, opened: Opened) -> Any:
        inward = asked.one_of("way", "out", "in") == "in"
        layer, head, index = (asked.number(name) for name in ("layer", "head", "index"))
        by_words = asked.one_of("by", "tokens", "words") == "words"
        fan = opened.word_fan if by_words else opened.fan
        return fan(layer, head, index, batch=asked.number("batch", 0), inward=inward)

    def segments(self, asked: _Asked, opened: Opened) -> Any:
        token = asked.number("index") if asked.word("index") else None
        by_words = asked.one_of("by", "tokens", "words") == "words"
        layer, batch = asked.number("layer"), asked.number("batch", 0)
        return opened.segments(asked.word("given"), layer, token, batch, by_words)

    def weight(self, asked: _Asked, opened: Opened) -> Any:
        layer, head, row, col = (asked.number(name) for name in ("layer", "head", "row", "col"))
        return opened.weight(layer, head, row, col, asked.number("batch", 0))

    def matching(self, asked: _Asked, opened: Opened) -> Any:
        return opened.matching(asked.word("text"), asked.one_of("side", "text", "decoder"))

    def reads(self, asked: _Asked, opened: Opened) -> Any:
        return opened.reads(asked.word("source"), asked.word("target"), asked.number("batch", 0))

    async def tiles(self, request: Request) -> Response:
        """Tiles one after another, each 65,536 bytes: sent when it is computed.

        Whoever goes away stops the work: this generator is cancelled, and computes no further.
        """
        try:
            asked = _Asked(request)
            layer, head, zoom = (asked.number(name) for name in ("layer", "head", "zoom"))
            batch, reduce = asked.number("batch", 0), asked.one_of("reduce", "sum", "max")
            places, sinks = asked.places("at"), asked.number("sinks", 1) > 0
            first = self.early(asked) if sinks and len(places) == 1 else None
            if first is not None:
                data = first.tile(layer, (head, zoom, *places[0]), reduce, batch)
                self.begun.set()
                if data is not None:
                    return Response(data, media_type="application/octet-stream")
            await asyncio.wrap_future(self.loaded)
            opened = self.which(asked)
            opened.layer(layer, head, batch)
        except (RegardError, OSError) as error:
            return _refused(error)

        def one(row: int, col: int) -> bytes:
            self.computed += 1
            opened.check()
            return opened.tile(layer, (head, zoom, row, col), reduce, batch, sinks)

        loop = asyncio.get_running_loop()
        try:
            begun = await loop.run_in_executor(self.pool, one, *places[0])
        except (RegardError, OSError) as error:
            return _refused(error)

        async def stream() -> AsyncIterator[bytes]:
            yield begun
            for place in places[1:]:
                yield await loop.run_in_executor(self.pool, one, *place)

        return StreamingResponse(stream(), media_type="application/octet-stream")


def _page(pieces: Sequence[Any], number: int) -> dict[str, Any]:
    start = number * PAGE
    return {"start": start, "pieces": pieces[start : start + PAGE]}


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


def page_file(name: str) -> Traversable | None:
    """A file of this page, or one that it shares with the page of `look`."""
    for package in (__package__, __package__.rpartition(".")[0]):
        found = (files(package) / "page").joinpath(*name.split("/"))
        if found.is_file():
            return found
    return None


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

    def failed(loaded: Future[list[Opened]]) -> None:
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
