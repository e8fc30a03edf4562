"""Coordinator: which keys speak for a run. The root signs a delegation for each and may then be put away.

`keys/delegations.json` in the run's folder has what the root has signed. A key of the run that no delegation there
covers is delegated when the root's private key is in `keys/root`, else the run cannot start without it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from farflung.net.session import PURPOSES, delegate
from farflung.protocol.errors import ConfigError
from farflung.protocol.identity import Key, Signed, node_id, unseal
from farflung.protocol.messages import Delegation

LASTS_S = 365 * 24 * 3600.0
FILES = {"coordinator": "coordinator", "weights": "trainer", "receipts": "receipts", "verdicts": "verdicts"}
"""Purpose → file of the private key."""


@dataclass(frozen=True)
class Keyring:
    """The root's public key and what it has signed."""

    root: bytes
    signed: tuple[Signed, ...]

    def delegations(self) -> list[Delegation]:
        """Those for any run, expired ones too. Raises BadSignature."""
        return [unseal(one, "delegation", Delegation, public=self.root) for one in self.signed]

    def live_signed(self, now: float) -> list[Signed]:
        """The signed delegations that have not expired."""
        pairs = zip(self.signed, self.delegations(), strict=True)
        return [one for one, said in pairs if said.expires_at > now]

    def live(self, run: str, purpose: str, now: float) -> list[bytes]:
        """Public keys that may sign documents of one kind for a run."""
        mine = (one for one in self.delegations() if (one.run, one.purpose) == (run, purpose))
        return [one.public for one in mine if one.expires_at > now]


def delegated(folder: Path, run: str, publics: Mapping[str, bytes], now: float) -> Keyring:
    """The keyring of a run whose keys are these by purpose, completed by the root if it is here. Raises ConfigError."""
    ring = read(folder)
    missing = [purpose for purpose in PURPOSES if ring is None or publics[purpose] not in ring.live(run, purpose, now)]
    if not missing and ring is not None:
        return ring
    if ring is not None and not (folder / "root").exists():
        raise ConfigError(
            f"no root delegates the run's key for {missing[0]}, {node_id(publics[missing[0]])}, or no more; bring the "
            f"root's key to {folder / 'root'}, or run `farflung keys rotate` where it is"
        )
    root = Key.load_or_make(folder / "root")
    added = [delegate(root, run, purpose, publics[purpose], now + LASTS_S) for purpose in missing]
    return write(folder, root.public, [*(ring.live_signed(now) if ring else ()), *added])


def read(folder: Path) -> Keyring | None:
    """The keys in a folder, None if it has none. Raises ConfigError."""
    path = folder / "delegations.json"
    if not path.exists():
        return None
    try:
        signed = msgspec.json.decode(path.read_bytes(), type=list[Signed])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no list of delegations: {error}") from error
    if not signed:
        raise ConfigError(f"{path} is empty; move it away and the root in {folder / 'root'} delegates anew")
    return Keyring(signed[0].public, tuple(signed))


def root_of(folder: Path) -> bytes | None:
    """The public key of the root that vouches for a run, from its folder of keys; None if neither says."""
    ring = read(folder)
    if ring is not None:
        return ring.root
    return Key.load_or_make(folder / "root").public if (folder / "root").exists() else None


def write(folder: Path, root: bytes, signed: list[Signed]) -> Keyring:
    """Keep these, whole or not at all."""
    draft = folder / "delegations.json.draft"
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(signed)))
    draft.rename(folder / "delegations.json")
    return Keyring(root, tuple(signed))


def rotate(
    folder: Path, run: str, purpose: str, root: Key, now: float, lasts_s: float, *, revoke: bool, public: bytes = b""
) -> bytes:
    """Delegate a fresh key, or the one given, for a purpose; gives its public key. The old ones stay until they expire.

    With `revoke` they are refused from now on. A private key that was here is kept under its node id.
    """
    ring = read(folder)
    if ring is not None and ring.root != root.public:
        raise ConfigError(f"this run is vouched for by root {node_id(ring.root)}, the key given is {root.id}")
    if not public:
        path = folder / FILES[purpose]
        if path.exists():
            path.rename(folder / f"{FILES[purpose]}-{Key.load_or_make(path).id}")
        public = Key.load_or_make(path).public
    kept = [] if ring is None else ring.live_signed(now)
    if revoke and ring is not None:
        pairs = zip(ring.signed, ring.delegations(), strict=True)
        kept = [one for one, said in pairs if (said.run, said.purpose) != (run, purpose)]
    write(folder, root.public, [*kept, delegate(root, run, purpose, public, now + lasts_s)])
    return public
