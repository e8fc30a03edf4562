"""Coordinator: a node's record as it stands in the database, and the settings that it is judged by."""

from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.store.run import RunContext
from farflung.store.tables import NODES
from farflung.trust.record import NodeRecord, TrustSettings


def settings(run_ctx: RunContext) -> TrustSettings:
    """The trust core's view of the configuration."""
    return TrustSettings(**{name: getattr(run_ctx.config.trust, name) for name in TrustSettings.__struct_fields__})


def read(node: Row[Any]) -> NodeRecord:
    """The record in a row of the nodes."""
    return msgspec.msgpack.decode(node.record, type=NodeRecord)


def write(connection: Connection, node: str, record: NodeRecord) -> None:
    """Keep a record. Its status stands in the row too, which `move` changes."""
    connection.execute(_WRITTEN, {"id": node, "encoded": msgspec.msgpack.encode(record)})


_WRITTEN = NODES.update().where(NODES.c.node == sa.bindparam("id")).values(record=sa.bindparam("encoded"))
