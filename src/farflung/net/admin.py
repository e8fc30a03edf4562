"""The operator's token: where there is one, its bearer alone may use the admin routes."""

import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from farflung.protocol.errors import ConfigError

VARIABLE = "FARFLUNG_ADMIN_TOKEN"
LEAST_CHARS = 16


def read_token(file: str, environ: Mapping[str, str] = os.environ) -> str:
    """The token in the environment, else in the file that the configuration names; empty for none. Raises ConfigError.

    It is never part of the configuration itself, which is written beside the run.
    """
    token, origin = environ.get(VARIABLE, ""), VARIABLE
    if not token and file:
        token, origin = _from_file(Path(file)), file
    if token and (len(token) < LEAST_CHARS or not token.isascii() or not token.isprintable() or " " in token):
        raise ConfigError(
            f"the admin token of {origin} is none: it takes at least {LEAST_CHARS} printable ASCII characters without "
            "spaces, such as `openssl rand -hex 32` makes"
        )
    return token


def _from_file(file: Path) -> str:
    try:
        if file.stat().st_mode & 0o077:
            raise ConfigError(f"admin token file {file} can be read by others; chmod 600 {file}")
        text = file.read_bytes().decode("ascii", "replace").strip()
    except OSError as error:
        raise ConfigError(f"admin token file {file} cannot be read: {error.strerror}") from error
    if not text:
        raise ConfigError(
            f"admin token file {file} is empty; write a token into it, or take coordinator.admin_token_file away"
        )
    return text


def bears(header: str, token: str) -> bool:
    """Whether an Authorization header carries the token; takes as long whatever it says."""
    given = header.removeprefix("Bearer ").encode("utf-8", "replace")
    return hmac.compare_digest(hashlib.sha256(given).digest(), hashlib.sha256(token.encode()).digest())
