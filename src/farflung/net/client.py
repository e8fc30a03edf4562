"""The client's side of the wire: signs each request, turns problems back into errors, tries again when that helps."""

import asyncio
import contextlib
import logging
import os
import random
import socket
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import lru_cache
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import httpcore2
import httpx2
import msgspec

from farflung.protocol import wire
from farflung.protocol.errors import Busy, ConfigError, Malformed, Refusal, TooLarge, Unavailable, Unreachable, by_code
from farflung.protocol.identity import Key, sign_request

log = logging.getLogger(__name__)
T = TypeVar("T")
ANSWER_BYTES = 1 << 30
PROBLEM_BYTES = 10_000
BATCH_BYTES = 1 << 18
"""Of a large body so many bytes are read at a time: each look costs CPU, whatever it brings."""
AHEAD_BYTES = 2 * BATCH_BYTES
"""Bytes that may have been read from a line and not come out of the layers above it yet."""
LONGEST_PAUSE_S = 2.0
"""Between tries, at first 0.1 s; no two nodes pause as long, so that they do not all come at once."""
PLAIN = {"accept-encoding": "identity"}
CA_VARIABLE = "FARFLUNG_CA_FILE"
"""Environment variable that names a PEM file of authorities to trust beside the usual ones."""


httpcore2.AsyncHTTP11Connection.READ_NUM_BYTES = BATCH_BYTES  # pyright: ignore[reportAttributeAccessIssue]
_skew_s = 0.0


def set_skew(seconds: float) -> None:
    """Have every client of this process sign as if its clock were so far ahead: a fault that `farflung chaos` makes."""
    global _skew_s
    _skew_s = seconds


def wall_clock() -> float:
    """Seconds since 1970 by this process's clock."""
    return time.time() + _skew_s


class Client:
    """One node's line to one coordinator.

    Every request that changes something is idempotent, so a request that got no answer is simply sent again,
    with growing pauses, for `patience_s` seconds in all.
    """

    def __init__(
        self,
        url: str,
        key: Key,
        tag: str = "",
        *,
        patience_s: float = 60.0,
        transport: Any = None,
        clock: Callable[[], float] = wall_clock,
    ) -> None:
        self.url, self.key, self.tag, self.patience_s, self.clock = url.rstrip("/"), key, tag, patience_s, clock
        self.admin_token = ""
        """Sent along if there is one; see `farflung.net.admin`."""
        timeout = httpx2.Timeout(60.0, connect=5.0)
        try:
            self._http = httpx2.AsyncClient(
                base_url=self.url, transport=transport, timeout=timeout, trust_env=False, verify=_authorities()
            )
        except (httpx2.InvalidURL, ValueError) as error:
            raise ConfigError(f"{self.url[:200]!r} is no address: {error}") from error

    async def close(self) -> None:
        """Hang up."""
        await self._http.aclose()

    async def get(self, path: str, type: type[T]) -> T:
        """Fetch and parse an unsigned document."""
        return wire.decode(await self._retry("GET", path, b"", False), type)

    async def download(self, path: str, *, signed: bool = False, limit_bytes: int = ANSWER_BYTES) -> bytes:
        """Fetch a blob, cut off with TooLarge beyond `limit_bytes`."""
        return await self._retry("GET", path, b"", signed, limit_bytes=limit_bytes)

    async def download_into(self, path: str, file: BinaryIO, *, limit_bytes: int) -> None:
        """Fetch a blob, going on from the bytes that the file has; cut off with TooLarge beyond `limit_bytes`.

        A server that knows no ranges sends it whole, and the file begins anew.
        """
        await self._insist(path, lambda: self._once_into(path, file, limit_bytes))

    async def download_range(self, path: str, start: int, end: int) -> list[bytes]:
        """Bytes [start, end) of a blob, as they came. Raises Malformed if the answer is anything else."""
        return await self._insist(path, lambda: self._once_range(path, start, end))

    async def put(self, path: str, body: bytes) -> None:
        """Upload bytes."""
        await self._retry("PUT", path, body, True, {"content-type": "application/octet-stream"})

    async def post(self, path: str, message: msgspec.Struct, type: type[T]) -> T:
        """Send a message, parse the answer."""
        body = wire.encode(message)
        return wire.decode(await self._retry("POST", path, body, True), type)

    async def _retry(
        self,
        method: str,
        path: str,
        body: bytes,
        signed: bool,
        headers: dict[str, str] | None = None,
        limit_bytes: int = ANSWER_BYTES,
    ) -> bytes:
        return await self._insist(path, lambda: self._once(method, path, body, signed, headers or {}, limit_bytes))

    async def _insist(self, path: str, once: Callable[[], Awaitable[T]]) -> T:
        pause_s, since = 0.1, self.clock()
        while True:
            try:
                return await once()
            except (Unreachable, Unavailable, Busy) as error:
                wait_s = (getattr(error, "retry_after_s", None) or pause_s) * random.uniform(0.75, 1.5)
                if self.clock() + wait_s > since + self.patience_s:
                    raise
                log.info("retrying path=%s in_s=%.1f because=%s", path, wait_s, error)
            await asyncio.sleep(wait_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _once(
        self, method: str, path: str, body: bytes, signed: bool, headers: dict[str, str], limit_bytes: int
    ) -> bytes:
        headers = {"accept": wire.MSGPACK, "content-type": wire.MSGPACK, **PLAIN} | headers
        if self.admin_token:
            headers["authorization"] = f"Bearer {self.admin_token}"
        if signed:
            parts = urlsplit(self.url + path)
            headers |= sign_request(self.key, method, parts.path, parts.query, body, now=self.clock(), tag=self.tag)
        try:
            async with self._http.stream(method, path, content=body, headers=headers) as response:
                content = b"".join(await _bounded(response, limit_bytes))
        except (httpx2.TransportError, httpx2.DecodingError, OSError) as error:
            raise Unreachable(f"{self.url} does not answer ({type(error).__name__}: {error})") from error
        if response.status_code >= 300:  # redirects are not followed: a signature is for one path
            raise _refusal(response, content)
        return content

    async def _once_range(self, path: str, start: int, end: int) -> list[bytes]:
        headers = {**PLAIN, "range": f"bytes={start}-{end - 1}"}
        try:
            async with self._http.stream("GET", path, headers=headers) as response:
                content = await _bounded(response, end - start if response.status_code == 206 else PROBLEM_BYTES)
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise Unreachable(f"{self.url} does not answer ({type(error).__name__}: {error})") from error
        if response.status_code >= 300:
            raise _refusal(response, b"".join(content))
        if (size := sum(map(len, content))) != end - start:
            raise Malformed(f"{response.url} gives {size} bytes where {end - start} were asked for")
        return content

    async def _once_into(self, path: str, file: BinaryIO, limit_bytes: int) -> None:
        start = file.seek(0, os.SEEK_END)
        headers = PLAIN | ({"range": f"bytes={start}-"} if start else {})
        try:
            async with self._http.stream("GET", path, headers=headers) as response:
                if response.status_code >= 300:
                    raise _refusal(response, b"".join(await _bounded(response, PROBLEM_BYTES)))
                if response.status_code != 206:
                    start = file.seek(0)
                    file.truncate()
                async for part in _parts(response):
                    start += len(part)
                    if start > limit_bytes:
                        raise TooLarge(f"{response.url} sends more than {limit_bytes} bytes; it was cut off")
                    file.write(part)
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise Unreachable(f"{self.url} does not answer ({type(error).__name__}: {error})") from error


def _authorities() -> ssl.SSLContext:
    """Certificates that vouch for https addresses, those of FARFLUNG_CA_FILE among them. Raises ConfigError."""
    return _context(os.environ.get(CA_VARIABLE, ""))


@lru_cache(maxsize=4)
def _context(ca_file: str) -> ssl.SSLContext:
    """Reading them takes a third of a second, so all lines share them."""
    context = httpx2.create_ssl_context(trust_env=False)
    if ca_file:
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"{ca_file} of {CA_VARIABLE} holds no certificates in PEM: {error}") from error
    return context


async def _parts(response: Any) -> AsyncGenerator[bytes]:
    """The body as it comes. While much of it is to come, the kernel wakes this process for BATCH_BYTES at a time.

    Raises Malformed for one that is packed: a quarter of a megabyte of empty frames takes half a second to unpack.
    """
    if (packed := response.headers.get("content-encoding", "identity")).lower() != "identity":
        raise Malformed(f"{response.url} sends a body packed as {packed[:40]!r}; it was asked for a plain one")
    stream = response.extensions.get("network_stream")
    line = stream.get_extra_info("socket") if stream else None
    size = int(response.headers.get("content-length", "0")[:18])
    waits_for = 1
    try:
        async for part in response.aiter_bytes():
            left = size - response.num_bytes_downloaded - AHEAD_BYTES
            if line and waits_for != (waits_for := max(1, min(left, BATCH_BYTES))):
                _wait_for(line, waits_for)
            yield part
    finally:
        if line and waits_for > 1:
            _wait_for(line, 1)


def _wait_for(line: socket.socket, size_bytes: int) -> None:
    """Nothing is read from a line before so much is there, or it ends. Where that cannot be had it costs only CPU."""
    with contextlib.suppress(OSError):
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size_bytes)


async def _bounded(response: Any, limit_bytes: int) -> list[bytes]:
    """The body as far as it is sane: the server may be out to fill this machine's memory."""
    parts: list[bytes] = []
    size = 0
    async for part in _parts(response):
        size += len(part)
        if size > limit_bytes:
            raise TooLarge(f"the answer of {response.url} has more than {limit_bytes} bytes; it was cut off")
        parts.append(part)
    return parts


class _Problem(msgspec.Struct):
    code: str = ""
    detail: str = ""


def _refusal(response: Any, content: bytes) -> Refusal:
    try:
        problem = msgspec.json.decode(content[:PROBLEM_BYTES], type=_Problem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        problem = _Problem(detail=f"HTTP {response.status_code} from {response.url}")
    fallback = Unavailable if response.status_code >= 500 else Malformed
    error = by_code().get(problem.code, fallback)(problem.detail)
    error.status = response.status_code
    after = response.headers.get("retry-after", "")
    error.retry_after_s = float(after[:9]) if after.isascii() and after.isdigit() else None
    return error
