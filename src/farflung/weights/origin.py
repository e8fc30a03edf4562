"""Coordinator (and relay): serve blobs by digest, whole or by range."""

import re
from collections.abc import AsyncIterator

from starlette.responses import Response, StreamingResponse

from farflung.protocol.errors import OutOfRange
from farflung.store.blobs import Blobs

RANGE_BYTES = 1 << 17
"""Bytes sent at once: the part that the socket does not take is copied, and of more bytes more is left over."""


async def serve(blobs: Blobs, digest: str, range_header: str) -> tuple[Response, int]:
    """The answer to a GET of a blob, and how many bytes it sends. Raises NotFound or OutOfRange."""
    size = await blobs.size(digest)
    start, end = byte_range(range_header, size)
    headers = {"content-length": str(end - start), "etag": f'"{digest}"', "accept-ranges": "bytes"}
    is_whole = (start, end) == (0, size)
    if not is_whole:
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    body = _ranges(blobs, digest, start, end)
    status = 200 if is_whole else 206
    return StreamingResponse(body, status, headers=headers, media_type="application/octet-stream"), end - start


def byte_range(header: str, size: int) -> tuple[int, int]:
    """[start, end) of a Range header with one range; the whole blob when there is none. Raises OutOfRange."""
    given = re.fullmatch(r"bytes=(\d{1,18})-(\d{0,18})", header)
    if not given:
        return 0, size
    start = int(given[1])
    end = min(size, int(given[2]) + 1) if given[2] else size
    if start >= end:
        raise OutOfRange(f"range {header!r} is not within the {size} bytes of this blob")
    return start, end


async def _ranges(blobs: Blobs, digest: str, start: int, end: int) -> AsyncIterator[bytes]:
    for at in range(start, end, RANGE_BYTES):
        yield await blobs.get_range(digest, at, min(end, at + RANGE_BYTES))
