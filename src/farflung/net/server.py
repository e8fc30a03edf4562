"""The server's side of the wire: bounded bodies, verified signatures, one shape of error, one table of routes.

A role lists its routes as `Route` values; `mount` puts them on a Starlette app. A handler gets a
`Call` and returns a message, bytes or a Starlette response.
"""

import asyncio
import logging
import math
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route as PathRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from farflung.net.bodies import Bodies, Grow
from farflung.protocol import wire
from farflung.protocol.errors import (
    BadSignature,
    Broken,
    ConfigError,
    Malformed,
    NotFound,
    Refusal,
    Replayed,
    TooLarge,
    Unavailable,
)
from farflung.protocol.identity import CLOCK_SKEW_S, Signer, check_digest, verify_request

log = logging.getLogger(__name__)
BODY_BYTES = 64 * 1024
"""Default cap of a body; routes that carry tokens or blobs say more."""
BODY_S, SLOWEST_BYTES_PER_S = 60.0, 100_000
"""A body has so long to arrive, and longer while it comes at this speed: the rollouts of a long lease are megabytes."""


@dataclass(frozen=True)
class Call:
    """One request, checked: its node, its body, its route."""

    message: Any
    body: bytes
    path: dict[str, str]
    signer: Signer | None
    request: Request

    @property
    def node(self) -> str:
        """Id of the node that signed."""
        return self._signed().node

    @property
    def public(self) -> bytes:
        """Public key that signed."""
        return self._signed().public

    def _signed(self) -> Signer:
        if self.signer is None:
            raise BadSignature(f"{self.request.method} {self.request.scope['path'][:200]} must be signed")
        return self.signer


Handler = Callable[[Call], Awaitable[Any]]


@dataclass(frozen=True)
class Route:
    """One line of the protocol."""

    method: str
    path: str
    handler: Handler
    takes: type[Any] | None = None
    gives: type[Any] | None = None
    signed: bool = True
    limit_bytes: int = BODY_BYTES
    gate: Callable[[Call], Awaitable[int]] | None = None
    """For bodies that may be large: looks at node and route before any of it is read, and says how much may come."""
    raw: bool = False
    """The body is bytes, not a message."""


@dataclass
class Nonces:
    """Nonces seen within the clock skew. Lost on restart, which is harmless: mutations are idempotent."""

    limit: int = 500_000
    _seen: OrderedDict[str, float] = field(default_factory=OrderedDict[str, float])

    def check(self, nonce: str, now: float) -> None:
        """Remember a nonce. Raises Replayed, or Unavailable when full."""
        self._forget(now)
        if nonce in self._seen:
            raise Replayed
        if len(self._seen) >= self.limit:
            raise Unavailable("too many requests within two minutes to remember; try again later", retry_after_s=5)
        self._seen[nonce] = now + 2 * CLOCK_SKEW_S

    def _forget(self, now: float) -> None:
        """Drop from the front, where the oldest are, so that a flood costs no scan of all of them."""
        while self._seen and next(iter(self._seen.values())) <= now:
            self._seen.popitem(last=False)


Endpoint = Callable[[Request], Awaitable[Response]]


class Paths:
    """Endpoints by method and path. One look-up a request; Starlette tries one regular expression after another."""

    def __init__(self) -> None:
        self._root: dict[Any, Any] = {}

    def add(self, method: str, path: str, endpoint: Endpoint) -> None:
        """Know one more; a part in braces is any part that is not empty."""
        at, names = self._root, list[str]()
        for part in path.split("/"):
            if part.startswith("{"):
                names.append(part[1:-1])
            at = at.setdefault(_ANY if part.startswith("{") else part, {})
        at.setdefault(_END, {})[method] = endpoint, names

    def find(self, method: str, path: str) -> tuple[Endpoint, dict[str, str]] | None:
        """The endpoint, and what stands in the place of its names."""
        at, values = self._root, list[str]()
        for part in path.split("/"):
            if (below := at.get(part)) is None:
                values.append(part)
                below = at.get(_ANY) if part else None
            if below is None:
                return None
            at = below
        endpoint, names = at.get(_END, {}).get(method, (None, ()))
        return None if endpoint is None else (endpoint, dict(zip(names, values, strict=True)))


_ANY, _END = object(), object()


class Shortcut:
    """Answers the protocol's own requests ahead of Starlette, whose own part takes longer than the work of most."""

    def __init__(self, app: ASGIApp, paths: Paths) -> None:
        self._app, self._paths = app, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on what is no route of the protocol."""
        found = self._paths.find(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        endpoint, scope["path_params"] = found
        try:
            response = await endpoint(Request(scope, receive))
        except Refusal as error:
            response = problem_response(error)
        await response(scope, receive, send)


def mount(
    app: Starlette,
    routes: Sequence[Route],
    tag: str,
    clock: Callable[[], float] = time.time,
    count: Callable[[str], None] = lambda node: None,
    bodies: Bodies | None = None,
) -> Shortcut:
    """Add the routes to the app and the error shape to all of it, and a way past it for them.

    `count` may raise Busy for a node that signed; `bodies` bounds what routes with a gate receive at a time.
    """
    nonces, paths = Nonces(), Paths()
    bodies = bodies or Bodies(math.inf)
    app.router.redirect_slashes = False  # a redirect would not be a problem+json, and repeats the Host header
    for route in routes:
        endpoint = _endpoint(route, nonces, tag, clock, count, bodies)
        paths.add(route.method, route.path, endpoint)
        add_route(app, route.method, route.path, endpoint)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(404, _no_route)
    app.add_exception_handler(405, _no_route)
    return Shortcut(app, paths)


def add_route(app: Starlette, method: str, path: str, endpoint: Endpoint) -> None:
    """One more route; HEAD, which Starlette adds to each GET, is no method of ours."""
    route = PathRoute(path, endpoint)
    route.methods = {method}
    app.router.routes.append(route)


def _endpoint(
    route: Route,
    nonces: Nonces,
    tag: str,
    clock: Callable[[], float],
    count: Callable[[str], None],
    bodies: Bodies,
) -> Endpoint:
    async def answer(request: Request) -> Response:
        path = {name: _checked(name, value) for name, value in request.path_params.items()}
        headers = _headers(request)
        signer = None
        if route.signed:
            signer = _verify(request, headers, tag, clock())
            count(signer.node)
            nonces.check(signer.node + signer.nonce, clock())
        door = Call(None, b"", path, signer, request)
        if route.gate is None:
            return await serve(door, headers, route.limit_bytes, _any_size)
        async with bodies.receiving(door.node) as grow:
            return await serve(door, headers, await route.gate(door), grow)

    async def serve(door: Call, headers: Mapping[str, str], limit: int, grow: Grow) -> Response:
        body = await _read(door.request, headers, limit, grow)
        if route.signed:
            check_digest(headers, body)
        found = await route.handler(replace(door, message=_message(route, body, headers), body=body))
        return found if isinstance(found, Response) else _respond(headers, found)

    async def endpoint(request: Request) -> Response:
        try:
            return await answer(request)
        except Refusal:
            raise
        except Exception as error:  # whatever broke stays in the log: a stranger learns nothing of it
            log.exception("broken %s %s", request.method, route.path)
            raise Broken from error

    return endpoint


def _headers(request: Request) -> dict[str, str]:
    """By name in lower case, the first of each; looked up so often that going through the list each time is dear."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(request.scope["headers"])}


_ID, _SIZE = re.compile(r"[A-Za-z0-9_.-]{1,80}"), re.compile(r"\d{1,18}")


def _checked(name: str, value: str) -> str:
    """A part of the path that can be an id. Raises NotFound; a NUL, say, would upset the database."""
    if not _ID.fullmatch(value):
        raise NotFound(f"{value[:80]!r} is no {name}")
    return value


def _message(route: Route, body: bytes, headers: Mapping[str, str]) -> Any:
    if route.takes is None or route.raw:
        return None
    return wire.decode(body, route.takes, _content_type(headers))


def _verify(request: Request, headers: Mapping[str, str], tag: str, now: float) -> Signer:
    url = request.scope
    path = url.get("raw_path", url["path"].encode()).partition(b"?")[0].decode("latin-1")
    query = url["query_string"].decode("latin-1")
    return verify_request(headers, request.method, path, query, now=now, tag=tag)


def _any_size(size: int) -> None:
    """Small bodies are bounded by the number of connections."""


async def _read(request: Request, headers: Mapping[str, str], limit: int, grow: Grow) -> bytes:
    """The whole body, refused before it is read when it says it is too large, and while it is when it lies."""
    declared = headers.get("content-length", "0")
    if not _SIZE.fullmatch(declared):
        raise Malformed(f"Content-Length {declared[:40]!r} is not a number")
    if int(declared) > limit:
        raise TooLarge(f"the body has {declared} bytes; this route takes {limit}")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_S) as patience:
            async for part in request.stream():
                patience.reschedule(later(patience.when() or 0.0, asyncio.get_running_loop().time(), len(part)))
                size += len(part)
                if size > limit:
                    raise TooLarge(f"the body has more than the {limit} bytes this route takes")
                grow(len(part))
                parts.append(part)
    except TimeoutError:
        raise Malformed(
            f"{size} bytes of the body arrived, then none within {BODY_S:.0f} s or too few; send it faster"
        ) from None
    except ClientDisconnect:
        raise Malformed("the connection ended before the body did") from None
    return b"".join(parts)


def later(deadline: float, now: float, size_bytes: int) -> float:
    """When a body is cut off after so many bytes more: speed buys time, but no right to idle for longer than BODY_S."""
    return min(now + BODY_S, deadline + size_bytes / SLOWEST_BYTES_PER_S)


def _content_type(headers: Mapping[str, str]) -> str:
    return headers.get("content-type", wire.JSON)


def _respond(headers: Mapping[str, str], answer: Any) -> Response:
    if answer is None:
        return Response(status_code=204)
    kind = wanted(headers)
    return Response(wire.encode(answer, kind), media_type=kind)


def wanted(headers: Mapping[str, str]) -> str:
    """The encoding in which a caller with these headers, by name in lower case, wants its answer."""
    return wire.MSGPACK if "msgpack" in headers.get("accept", "") + _content_type(headers) else wire.JSON


def problem_response(error: Refusal) -> Response:
    """A refusal as application/problem+json."""
    headers = {} if error.retry_after_s is None else {"retry-after": str(math.ceil(error.retry_after_s))}
    return Response(
        msgspec.json.encode(error.problem()),
        status_code=error.status,
        media_type="application/problem+json",
        headers=headers,
    )


def listen(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """A listening socket, one of several on its port if it is shared. Raises ConfigError if the address is taken."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from error
    return listener


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return problem_response(error)


async def _no_route(request: Request, error: Any) -> Response:
    path = request.scope["path"][:200]  # request.url would parse the Host header, which may be anything
    refusal = Refusal(f"there is no route {request.method} {path}; docs/protocol.md lists them")
    refusal.status, refusal.code = error.status_code, "not-found" if error.status_code == 404 else "no-such-method"
    return await _refused(request, refusal)
