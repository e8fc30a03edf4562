"""Bytes to messages and back: msgpack or JSON, by content type, strictly."""

from typing import Any, TypeVar

import msgspec
import numpy as np

from farflung.protocol.errors import Malformed

T = TypeVar("T")
MSGPACK = "application/msgpack"
JSON = "application/json"


def encode(message: Any, content_type: str = MSGPACK) -> bytes:
    """A message as bytes; anything but JSON is msgpack."""
    return msgspec.json.encode(message) if content_type == JSON else msgspec.msgpack.encode(message)


def decode(body: bytes, type: type[T], content_type: str = MSGPACK) -> T:
    """Parse a message. Raises Malformed, naming the field."""
    decoder = _decoder(content_type)
    try:
        return decoder(body, type=type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"this is no valid {type.__name__}: {error}; docs/protocol.md has its fields") from error


def _decoder(content_type: str) -> Any:
    kind = content_type.partition(";")[0].strip().lower()
    if kind == JSON:
        return msgspec.json.decode
    if kind == MSGPACK:
        return msgspec.msgpack.decode
    raise Malformed(f"content type {content_type[:80]!r} is not spoken here; use {MSGPACK} or {JSON}")


def pack_ids(ids: Any) -> bytes:
    """Token ids as little-endian uint32."""
    return np.asarray(ids, dtype="<u4").tobytes()


def unpack_ids(data: bytes) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Token ids from bytes. Raises Malformed for a broken length."""
    if len(data) % 4:
        raise Malformed(f"token ids are 4 bytes each; {len(data)} bytes is no whole number of them")
    return np.frombuffer(data, dtype="<u4")


def pack_floats(values: Any) -> bytes:
    """float32 values, little-endian."""
    return np.asarray(values, dtype="<f4").tobytes()


def unpack_floats(data: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 values from bytes. Raises Malformed for a broken length or a value that is not finite."""
    if len(data) % 4:
        raise Malformed(f"float32 values are 4 bytes each; {len(data)} bytes is no whole number of them")
    values = np.frombuffer(data, dtype="<f4")
    if not np.isfinite(values).all():
        raise Malformed("a float is NaN or infinite; send finite values only")
    return values
