"""Digests: bytes are named by BLAKE3, in 64 hex digits.

A tenth of SHA-256's time on processors without instructions for it, as many consumers' are
(docs/decisions/0043-names-by-blake3.md). J. O'Connor et al., "BLAKE3: one function, fast everywhere", 2020.
"""

from pathlib import Path

from blake3 import blake3

DIGEST_CHARS = 64
READ_BYTES = 1 << 20


def digest_of(data: bytes | memoryview) -> str:
    """The name of bytes, or of an array of them."""
    return blake3(data).hexdigest()


def file_digest(path: Path) -> str:
    """The name of a file's bytes."""
    found = blake3()
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            found.update(data)
    return found.hexdigest()
