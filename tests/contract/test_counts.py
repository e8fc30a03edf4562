"""Sums that the database keeps are what the rows add up to: whoever writes, whatever is undone."""

import asyncio
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from farflung.store import counts, ledger
from farflung.store.db import Database, migrate
from farflung.store.tables import AUDIT_COUNTS, AUDITS, BALANCES, ENTRIES


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    migrate(database_url)
    database = Database(database_url)
    yield database
    database.close()


def audit(number: int, node: str) -> dict[str, object]:
    row = {"audit": f"a{number}", "run": "r", "kind": "draw", "submission": "s", "lease": "l", "node": node}
    return row | {"status": "open", "step": 0, "rollouts": "[]", "opened_at": 0.0}


def kept(connection: sa.Connection) -> dict[tuple[str, str], int]:
    rows = connection.execute(sa.select(AUDIT_COUNTS.c.node, AUDIT_COUNTS.c.status, AUDIT_COUNTS.c.count))
    return {(row[0], row[1]): row[2] for row in rows if row[2]}


def test_rows_that_come_change_and_go_are_counted_and_what_is_undone_is_not(database: Database) -> None:
    def change(connection: sa.Connection) -> None:
        connection.execute(AUDITS.insert(), [audit(number, f"n{number % 2}") for number in range(5)])
        connection.execute(AUDITS.update().where(AUDITS.c.node == "n0").values(status="claimed"))
        connection.execute(AUDITS.update().values(claimed_by="v"))
        connection.execute(AUDITS.delete().where(AUDITS.c.audit.in_(["a0", "a1"])))

    def fail(connection: sa.Connection) -> None:
        connection.execute(AUDITS.insert().values(audit(9, "n0")))
        raise ValueError("the set is taken back")

    async def play() -> None:
        await database.write(change)
        with pytest.raises(ValueError, match="taken back"):
            await database.write(fail)

    asyncio.run(play())
    with database.engine.connect() as connection:
        assert kept(connection) == {("n0", "claimed"): 2, ("n1", "open"): 1}
        assert list(counts.differences(connection)) == []


def test_balances_are_what_the_entries_add_up_to_and_a_change_by_hand_is_named(database: Database) -> None:
    paid = [ledger.Transfer(f"r{n}", ledger.ISSUED, ledger.escrow(f"n{n % 3}"), 2**33 + n) for n in range(50)]
    ripe = [ledger.Transfer("step", ledger.escrow("n1"), ledger.credit("n1"), 7)]

    async def play() -> None:
        for transfers in (paid, ripe, paid[:1]):
            await database.write(lambda c, some=transfers: ledger.post(c, some, "r", 0.0))

    asyncio.run(play())
    with database.engine.connect() as connection:
        query = sa.select(ENTRIES.c.account, sa.func.sum(ENTRIES.c.tokens)).group_by(ENTRIES.c.account)
        assert ledger.balances(connection) == {row[0]: int(row[1]) for row in connection.execute(query)}
        assert ledger.balance(connection, ledger.credit("n1")) == 7
        assert ledger.balance(connection, "nobody's") == 0
        changed = BALANCES.update().where(BALANCES.c.account == ledger.credit("n1"))
        connection.execute(changed.values(tokens=8))
        (wrong,) = counts.differences(connection)
        assert "balances of credit:n1" in wrong
        connection.rollback()
