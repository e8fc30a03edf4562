"""Coordinator: bodies that were stored for submissions which were refused in the end, so that no row names them.

A body is stored before its row, so one without a row may be about to get it. Its digest covers the lease, and a lease
that is closed takes nothing more; hence what is older than any open lease stays unreferenced.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.store.blobs import Blobs
from farflung.store.db import Database
from farflung.store.tables import SUBMISSIONS

AT_ONCE = 500


async def delete_unreferenced(blobs: Blobs, database: Database, before: float) -> int:
    """Delete bodies that were stored before a time, in seconds since 1970, and that no row names; gives how many."""
    old = [digest async for digest, at in blobs.stored() if at < before]
    count = 0
    for start in range(0, len(old), AT_ONCE):
        digests = old[start : start + AT_ONCE]
        lost = await database.read(lambda c, some=digests: unnamed(c, some))
        await blobs.delete(lost)
        count += len(lost)
    return count


async def discard(blobs: Blobs, database: Database, digests: Sequence[str]) -> None:
    """Delete what was stored for a submission that is refused, unless another one names it."""
    await blobs.delete(await database.read(lambda c: unnamed(c, digests)))


def unnamed(connection: Connection, digests: Sequence[str]) -> list[str]:
    """Those of some blobs that no submission names."""
    known = set[str]()
    for column in (SUBMISSIONS.c.submission, SUBMISSIONS.c.logp_blob):
        known |= set(connection.execute(sa.select(column).where(column.in_(digests))).scalars())
    return [digest for digest in digests if digest not in known]
