"""Coordinator: a node's record as it stands in the database, and the settings that it is judged by."""

from typing import Any

import msgspec
from sqlalchemy import Connection, Row

from farflung.store.book import Book
from farflung.store.tables import NODES
from farflung.trust.record import NodeRecord, TrustSettings


def settings(book: Book) -> TrustSettings:
    """The trust core's view of the configuration."""
    return TrustSettings(
        **book.config.trust.model_dump(exclude={"fingerprint", "probation_slots", "probation_waiting"})
    )


def read(node: Row[Any]) -> NodeRecord:
    """The record in a row of the nodes."""
    return msgspec.msgpack.decode(node.record, type=NodeRecord)


def write(connection: Connection, node: str, record: NodeRecord) -> None:
    """Keep a record. Its status stands in the row too, which `move` changes."""
    connection.execute(NODES.update().where(NODES.c.node == node).values(record=msgspec.msgpack.encode(record)))
