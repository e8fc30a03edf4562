"""Worker: keep the coordinator's signed receipts. Each names the one before, so that none can vanish quietly."""

import logging
import os
from pathlib import Path

import msgspec

from farflung.protocol.digest import digest_of
from farflung.protocol.identity import Signed, Trusted, unseal
from farflung.protocol.messages import Receipt

log = logging.getLogger(__name__)
FILE = "receipts.jsonl"


class Receipts:
    """The receipts that this node was given, one sealed receipt a line, across restarts."""

    def __init__(self, folder: Path, part: int | None = None) -> None:
        """`part` numbers the processes of one node, each of which keeps those that it is given itself."""
        self.path, self._is_part = folder / (FILE if part is None else f"receipts-{part}.jsonl"), part is not None
        self._waiting = b""
        """Lines for which there was no room on the disk yet."""
        self._last = ""
        kept, _, torn = self.path.read_bytes().rpartition(b"\n") if self.path.exists() else (b"", b"", b"")
        if torn:  # this node was killed while it wrote
            os.truncate(self.path, len(kept) + bool(kept))
        if kept:
            self._last = _digest(msgspec.json.decode(kept.splitlines()[-1], type=Signed))

    def keep(self, signed: Signed, trusted: Trusted) -> bool:
        """Keep a receipt; gives whether it follows the last one. Raises BadSignature if it is not the coordinator's."""
        receipt, digest = unseal(signed, "receipt", Receipt, public=trusted), _digest(signed)
        if digest == self._last:
            return True
        is_next = not self._last or receipt.before == self._last or (self._is_part and bool(receipt.before))
        if not is_next:
            log.error(
                "receipts do not chain lease=%s before=%s last_kept=%s: an answer was lost here, or accepted work was "
                "dropped there; compare %s with the run's ledger",
                *(receipt.lease, receipt.before[:12] or "none", self._last[:12], self.path),
            )
        self._waiting += msgspec.json.encode(signed) + b"\n"
        self._last = digest
        self._write()
        return is_next

    def _write(self) -> None:
        """Write what waits, whole or not at all; a full disk is no reason to stop working."""
        size_bytes = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(self._waiting)
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size_bytes)
            log.warning("receipts wait for room on the disk bytes=%d because=%s", len(self._waiting), error)
        else:
            self._waiting = b""


def _digest(signed: Signed) -> str:
    return digest_of(signed.payload)
