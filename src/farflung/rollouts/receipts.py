"""Worker: keep the coordinator's signed receipts. Each names the one before, so that none can vanish quietly."""

import hashlib
import logging
from pathlib import Path

import msgspec

from farflung.protocol.identity import Signed, Trusted, unseal
from farflung.protocol.messages import Receipt

log = logging.getLogger(__name__)
FILE = "receipts.jsonl"


class Receipts:
    """What this node was acknowledged, one sealed receipt a line, across restarts."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._last = ""
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        if lines:
            self._last = _digest(msgspec.json.decode(lines[-1], type=Signed))

    def keep(self, signed: Signed, trusted: Trusted) -> bool:
        """Keep a receipt; gives whether it follows the last one. Raises BadSignature if it is not the coordinator's."""
        receipt, digest = unseal(signed, "receipt", Receipt, public=trusted), _digest(signed)
        if digest == self._last:
            return True
        is_next = not self._last or receipt.before == self._last
        if not is_next:
            log.error(
                "receipts do not chain lease=%s before=%s last_kept=%s: an answer was lost here, or accepted work was "
                "dropped there; compare %s with the run's ledger",
                *(receipt.lease, receipt.before[:12] or "none", self._last[:12], self.path),
            )
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(signed) + b"\n")
        self._last = digest
        return is_next


def _digest(signed: Signed) -> str:
    return hashlib.sha256(signed.payload).hexdigest()
