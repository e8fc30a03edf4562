"""A double-entry ledger in tokens: credit for accepted tokens, in escrow until it matures, burned by a verdict.

    issued ──accept──▶ escrow:NODE ──mature──▶ credit:NODE
                            └───────burn─────▶ burned

Every transfer writes two entries that cancel, so all accounts always sum to zero. Nothing that a worker says is in it.
Balances are kept with every entry (`store/counts.py`): no reader adds up the history.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.store.tables import BALANCES, ENTRIES

ISSUED, BURNED = "issued", "burned"


@dataclass(frozen=True)
class Transfer:
    """Tokens that go from one account to another because of something that has an id."""

    cause: str
    source: str
    target: str
    tokens: int


def escrow(node: str) -> str:
    """The account of what a node earned and may still lose."""
    return f"escrow:{node}"


def credit(node: str) -> str:
    """The account of what a node has for good."""
    return f"credit:{node}"


def entries(transfers: Iterable[Transfer], run: str, at: float) -> list[dict[str, Any]]:
    """Two cancelling entries for each transfer of a positive amount."""
    return [
        {"run": run, "at": at, "cause": transfer.cause, "account": account, "tokens": sign * transfer.tokens}
        for transfer in transfers
        if transfer.tokens > 0
        for account, sign in ((transfer.source, -1), (transfer.target, 1))
    ]


def post(connection: Connection, transfers: Iterable[Transfer], run: str, at: float) -> None:
    """Write transfers."""
    if rows := entries(transfers, run, at):
        connection.execute(ENTRIES.insert(), rows)


def balance(connection: Connection, account: str) -> int:
    """Tokens in one account."""
    return connection.execute(sa.select(BALANCES.c.tokens).where(BALANCES.c.account == account)).scalar() or 0


def balances(connection: Connection) -> dict[str, int]:
    """Every account with its tokens."""
    return {row[0]: row[1] for row in connection.execute(_BALANCES)}


_BALANCES = sa.select(BALANCES.c.account, BALANCES.c.tokens)
