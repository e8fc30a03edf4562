"""A double-entry ledger in tokens: credit for accepted tokens, in escrow until it matures, burned by a verdict.

    issued ──accept──▶ escrow:NODE ──mature──▶ credit:NODE
                            └───────burn─────▶ burned

Every transfer writes two entries that cancel, so all accounts always sum to zero. Nothing that a worker says is in it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.store.tables import ENTRIES

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
    total = sa.select(sa.func.coalesce(sa.func.sum(ENTRIES.c.tokens), 0)).where(ENTRIES.c.account == account)
    return int(connection.execute(total).scalar_one())


def balances(connection: Connection) -> dict[str, int]:
    """Every account with its tokens."""
    query = sa.select(ENTRIES.c.account, sa.func.sum(ENTRIES.c.tokens)).group_by(ENTRIES.c.account)
    return {account: int(tokens) for account, tokens in connection.execute(query)}
