"""Content-addressed bytes: a folder when embedded, S3 when shared. Write-once; the key is their digest."""

import contextlib
import logging
from collections.abc import AsyncIterator, Generator, Sequence
from datetime import timedelta
from urllib.parse import parse_qsl, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, MemoryStore, ObjectStore, S3Store

from farflung.protocol.digest import DIGEST_CHARS, digest_of
from farflung.protocol.errors import ConfigError, NotFound, Unavailable

log = logging.getLogger(__name__)
S3_PATIENCE = timedelta(seconds=10)
"""How long an S3 store that does not answer is asked again before the client is told to come back."""
S3_OPTIONS = ("endpoint", "region")


class Blobs:
    """Bytes by digest at `file:///folder`, `memory://` or `s3://bucket/prefix?endpoint=URL&region=NAME`.

    Credentials of S3 come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or the machine's role, never
    from the URL, which is written beside the run.
    """

    def __init__(self, url: str) -> None:
        self._store = _open(url)

    @property
    def is_shared(self) -> bool:
        """Whether a service keeps them, and looks after what it keeps."""
        return isinstance(self._store, S3Store)

    async def put(self, data: bytes, digest: str | None = None) -> str:
        """Store bytes and give their digest; those that are there already are left alone. Raises Unavailable."""
        digest = digest or digest_of(data)
        with _as_ours(digest, "stored"):
            try:
                await obstore.put_async(self._store, _path(digest), data, mode="create")
            except AlreadyExistsError:  # same digest, same bytes, unless a power cut left others
                await self._heal(data, digest)
        return digest

    async def _heal(self, data: bytes, digest: str) -> None:
        """Put bytes in the place of what is not what its name says; that which is stays, whatever is offered."""
        kept = await obstore.get_async(self._store, _path(digest))
        if digest_of(bytes(await kept.bytes_async())) != digest == digest_of(data):
            log.warning("blob %s was damaged and is stored again", digest[:12])
            await obstore.put_async(self._store, _path(digest), data)

    async def get(self, digest: str) -> bytes:
        """All bytes of a blob. Raises NotFound or Unavailable."""
        with _as_ours(digest, "read"):
            result = await obstore.get_async(self._store, _path(digest))
            return bytes(await result.bytes_async())

    async def delete(self, digests: Sequence[str]) -> None:
        """Forget these blobs; those that are gone already are no error. Raises Unavailable."""
        for digest in digests:
            with _as_ours(digest, "deleted"), contextlib.suppress(FileNotFoundError):
                await obstore.delete_async(self._store, _path(digest))

    async def stored(self) -> AsyncIterator[tuple[str, float]]:
        """Digest of every blob and when it was stored, in seconds since 1970. Raises Unavailable."""
        with _as_ours("", "listed"):
            async for found in obstore.list(self._store):  # pyright: ignore[reportUnknownMemberType]
                for one in found:
                    folder, _, name = one["path"].rpartition("/")
                    if folder == name[:2] and len(name) == DIGEST_CHARS:
                        yield name, one["last_modified"].timestamp()

    async def size(self, digest: str) -> int:
        """Size in bytes. Raises NotFound or Unavailable."""
        with _as_ours(digest, "found"):
            return (await obstore.head_async(self._store, _path(digest)))["size"]

    async def get_range(self, digest: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a blob. Raises NotFound or Unavailable."""
        with _as_ours(digest, "read"):
            return bytes(await obstore.get_range_async(self._store, _path(digest), start=start, end=end))


@contextlib.contextmanager
def _as_ours(digest: str, done: str) -> Generator[None]:
    """The store's errors as ours."""
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"there is no blob {digest}") from None
    except BaseError as error:
        raise Unavailable(f"blob {digest[:12]} cannot be {done}: {_first_line(error)}", retry_after_s=1) from error


def _path(digest: str) -> str:
    return f"{digest[:2]}/{digest}"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200]


def _open(url: str) -> ObjectStore:
    parts = urlsplit(url)
    try:
        match parts.scheme:
            case "file":
                return LocalStore(parts.path, mkdir=True, automatic_cleanup=False)
            case "memory":
                return MemoryStore()
            case "s3":
                return _open_s3(parts.netloc, parts.path.strip("/"), dict(parse_qsl(parts.query)))
            case _:
                raise ValueError("the scheme is none of file, memory and s3")
    except (BaseError, OSError, ValueError) as error:
        raise ConfigError(f"blob store {url!r} cannot be opened: {_first_line(error)}") from error


def _open_s3(bucket: str, prefix: str, options: dict[str, str]) -> S3Store:
    if unknown := sorted(set(options) - set(S3_OPTIONS)):
        raise ValueError(f"an S3 URL takes {' and '.join(S3_OPTIONS)}, not {unknown[0]}")
    return S3Store(
        bucket,
        prefix=prefix or None,
        config={name: value for name, value in options.items() if value},  # type: ignore[arg-type]
        client_options={"allow_http": options.get("endpoint", "").startswith("http://"), "timeout": S3_PATIENCE},
        retry_config={"max_retries": 5, "retry_timeout": S3_PATIENCE},
    )
