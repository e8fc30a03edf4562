"""Coordinator: stop verdicts and training when too many good nodes fail at once: then the verifier is suspect."""

import logging

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.store.book import Book
from farflung.store.stories import record
from farflung.store.tables import NODES, RUNS, VERDICTS
from farflung.trust.policy import is_brake

log = logging.getLogger(__name__)


def reason(connection: Connection, run: str) -> str:
    """Why the brake is on, empty if it is off."""
    return connection.execute(sa.select(RUNS.c.brake).where(RUNS.c.run == run)).scalar_one()


def is_on(connection: Connection, book: Book) -> bool:
    """Whether verdicts and training are held."""
    return bool(reason(connection, book.run))


def look(connection: Connection, book: Book, step: int, now: float) -> None:
    """Put the brake on if the nodes with a good record that failed at a step are too many."""
    since = sa.select(RUNS.c.brake_after).where(RUNS.c.run == book.run).scalar_subquery()
    failed = sa.select(sa.func.count(sa.distinct(VERDICTS.c.node))).where(
        VERDICTS.c.run == book.run,
        VERDICTS.c.step == step,
        VERDICTS.c.was_trusted,
        VERDICTS.c.outcome.in_(("void", "quarantine")),
        VERDICTS.c.id > since,
    )
    bad = connection.execute(failed).scalar_one()
    good = connection.execute(sa.select(sa.func.count()).where(NODES.c.status == "trusted")).scalar_one()
    trust = book.config.trust
    if is_brake(bad, bad + good, trust.brake_share, trust.brake_nodes):
        why = (
            f"{bad} of {bad + good} nodes with a good record failed verification at step {step}: the validators or the "
            "weights are suspect; nobody is ejected and nothing trained on until you say farflung brake --release"
        )
        _set(connection, book, why, now)
        log.error("brake run=%s because=%s", book.run, why)


def release(connection: Connection, book: Book, now: float) -> int:
    """The operator has looked: go on, and count afresh. Gives 0 if the brake was off."""
    if not is_on(connection, book):
        return 0
    last = sa.select(sa.func.coalesce(sa.func.max(VERDICTS.c.id), 0)).scalar_subquery()
    connection.execute(RUNS.update().where(RUNS.c.run == book.run).values(brake_after=last))
    _set(connection, book, "", now)
    return 1


def _set(connection: Connection, book: Book, why: str, now: float) -> None:
    status = book.status(connection)
    connection.execute(RUNS.update().where(RUNS.c.run == book.run).values(brake=why))
    record(connection, "run", [book.run], status, status, now, warning=why or "the brake was released")
