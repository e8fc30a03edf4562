"""`farflung keys`: which keys speak for a run, and another one in place of a key that is old or lost."""

import sys
import time
from pathlib import Path

from farflung.config import Config
from farflung.protocol.errors import ConfigError
from farflung.protocol.identity import Key, node_id
from farflung.tasks import keyring

DAY_S = 24 * 3600.0


def show(config: Config) -> None:
    """Print every delegation of a run."""
    ring = keyring.read(config.folder / "keys")
    if ring is None:
        raise ConfigError(f"{config.folder / 'keys'} has no delegations yet; the coordinator's first start makes them")
    sys.stdout.write(f"root         {node_id(ring.root)}  {ring.root.hex()}\n")
    for one in ring.delegations():
        days = (one.expires_at - time.time()) / DAY_S
        text = f"for {days:.0f} days" if days > 0 else f"expired {-days:.0f} days ago"
        sys.stdout.write(f"{one.purpose:<12} {node_id(one.public)}  {one.public.hex()}  {text}\n")


def rotate(config: Config, purpose: str, root: Path | None, days: float, *, revoke: bool, public: str) -> None:
    """Delegate another key for a purpose, and say what to do next. Raises ConfigError."""
    folder = config.folder / "keys"
    if purpose not in keyring.FILES:
        raise ConfigError(f"there is no purpose {purpose!r}; keys are for {', '.join(keyring.FILES)}")
    path = root or folder / "root"
    if not path.exists():
        raise ConfigError(f"{path} is missing: only the root's private key can delegate; name it with --root")
    given = _public(public)
    before = Key.load_or_make(folder / "trainer").public.hex() if (folder / "trainer").exists() else ""
    found = keyring.rotate(
        folder, config.run.name, purpose, Key.load_or_make(path), time.time(), days * DAY_S,
        revoke=revoke, public=given,
    )  # fmt: skip
    if purpose == "weights" and before:
        _replace(config.folder / "config.json", before, found.hex())
    sys.stdout.write(
        f"{purpose} is {node_id(found)}, public {found.hex()}, for {days:.0f} days\n"
        "start the coordinator again" + (", and the trainer\n" if purpose == "weights" else "\n")
    )


def _public(text: str) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b"?"
    if found and len(found) != 32:
        raise ConfigError(f"--public {text[:80]!r} is no public key of 64 hex digits")
    return found


def _replace(path: Path, before: str, after: str) -> None:
    """The trainer's grant in the saved configuration goes to its new key."""
    if path.exists():
        path.write_text(path.read_text().replace(before, after))
