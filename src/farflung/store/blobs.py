"""Content-addressed bytes: a folder when embedded, S3 when shared. Write-once; the key is the SHA-256."""

import contextlib
import hashlib
from collections.abc import Sequence
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url

from farflung.protocol.errors import ConfigError, NotFound, Unavailable


def digest_of(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


class Blobs:
    """Bytes by digest at `file:///folder`, `memory://` or `s3://bucket/prefix`."""

    def __init__(self, url: str) -> None:
        self._store = _open(url)

    async def put(self, data: bytes, digest: str | None = None) -> str:
        """Store bytes and give their digest; those that are there already are left alone."""
        digest = digest or digest_of(data)
        try:
            await obstore.put_async(self._store, _path(digest), data, mode="create")
        except AlreadyExistsError:
            pass  # same digest, same bytes
        except BaseError as error:
            raise Unavailable(f"blob {digest[:12]} cannot be stored: {_first_line(error)}") from error
        return digest

    async def get(self, digest: str) -> bytes:
        """All bytes of a blob. Raises NotFound."""
        try:
            result = await obstore.get_async(self._store, _path(digest))
            return bytes(await result.bytes_async())
        except FileNotFoundError:
            raise NotFound(f"there is no blob {digest}") from None

    async def delete(self, digests: Sequence[str]) -> None:
        """Forget these blobs; those that are gone already are no error."""
        for digest in digests:
            with contextlib.suppress(FileNotFoundError):
                await obstore.delete_async(self._store, _path(digest))

    async def size(self, digest: str) -> int:
        """Size in bytes. Raises NotFound."""
        try:
            return (await obstore.head_async(self._store, _path(digest)))["size"]
        except FileNotFoundError:
            raise NotFound(f"there is no blob {digest}") from None

    async def get_range(self, digest: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a blob. Raises NotFound."""
        try:
            return bytes(await obstore.get_range_async(self._store, _path(digest), start=start, end=end))
        except FileNotFoundError:
            raise NotFound(f"there is no blob {digest}") from None


def _path(digest: str) -> str:
    return f"{digest[:2]}/{digest}"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200]


def _open(url: str) -> ObjectStore:
    parts = urlsplit(url)
    try:
        if parts.scheme == "file":
            return LocalStore(parts.path, mkdir=True, automatic_cleanup=False)
        if parts.scheme == "memory":
            return MemoryStore()
        return from_url(url)
    except (BaseError, OSError, ValueError) as error:
        raise ConfigError(f"blob store {url!r} cannot be opened: {_first_line(error)}") from error
