"""The ledger in tokens: two entries that cancel for every transfer, and nothing else."""

import pytest
import sqlalchemy as sa

from farflung.store import ledger
from farflung.store.tables import metadata


@pytest.fixture
def connection():
    engine = sa.create_engine("sqlite://")
    metadata.create_all(engine)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def test_every_transfer_is_two_entries_that_cancel() -> None:
    transfers = [ledger.Transfer("r1", "issued", "escrow:n1", 5), ledger.Transfer("r2", "issued", "escrow:n2", 7)]
    rows = ledger.entries(transfers, "demo", 1.0)
    assert [(row["account"], row["tokens"], row["cause"]) for row in rows] == [
        ("issued", -5, "r1"),
        ("escrow:n1", 5, "r1"),
        ("issued", -7, "r2"),
        ("escrow:n2", 7, "r2"),
    ]
    assert sum(row["tokens"] for row in rows) == 0


@pytest.mark.parametrize("tokens", [0, -1, -(10**12)])
def test_nothing_goes_backwards(tokens) -> None:
    assert ledger.entries([ledger.Transfer("x", "a", "b", tokens)], "demo", 0.0) == []


def test_balances_follow_what_was_posted(connection) -> None:
    assert ledger.balance(connection, "escrow:n1") == 0
    ledger.post(connection, [], "demo", 0.0)
    ledger.post(connection, [ledger.Transfer("r1", ledger.ISSUED, ledger.escrow("n1"), 10)], "demo", 0.0)
    ledger.post(connection, [ledger.Transfer("s1", ledger.escrow("n1"), ledger.credit("n1"), 4)], "demo", 1.0)
    assert ledger.balances(connection) == {"issued": -10, "escrow:n1": 6, "credit:n1": 4}
    assert sum(ledger.balances(connection).values()) == 0


def test_amounts_beyond_32_bits(connection) -> None:
    for _ in range(3):
        ledger.post(connection, [ledger.Transfer("r1", ledger.ISSUED, ledger.escrow("n1"), 2**40)], "demo", 0.0)
    assert ledger.balance(connection, "escrow:n1") == 3 * 2**40
