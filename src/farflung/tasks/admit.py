"""Coordinator: who may take part, and the row that remembers a node."""

import hmac
import json

import msgspec
from sqlalchemy import Connection

from farflung.config import CoordinatorSection
from farflung.protocol.errors import Forbidden, TooOld
from farflung.protocol.identity import readable_name
from farflung.protocol.messages import Register
from farflung.protocol.states import first
from farflung.store.db import record
from farflung.store.tables import NODES
from farflung.trust.record import NodeRecord

UNTRUSTED = ("worker", "relay")
"""Roles that need no grant."""


def check(settings: CoordinatorSection, granted: str, node: str, ask: Register) -> None:
    """Whether a key may register as what it asks to be. Raises TooOld or Forbidden."""
    if ask.version < settings.minimum_version:
        raise TooOld(
            f"this node speaks protocol {ask.version}, {settings.minimum_version} is the oldest that may join; "
            "upgrade with: pip install -U farflung"
        )
    if ask.role not in UNTRUSTED:
        if granted != ask.role:
            raise Forbidden(f"node {node} is not granted the role {ask.role!r}; the operator grants it by config")
    elif settings.admission == "allow" and node not in settings.allow:
        raise Forbidden(f"this run admits listed nodes only; ask its operator to add {node} to coordinator.allow")
    elif settings.admission == "invite" and not _is_invited(settings, ask.invite):
        raise Forbidden("this run admits invited nodes only; join with --invite TOKEN, as its operator gave it to you")


def _is_invited(settings: CoordinatorSection, token: str) -> bool:
    """Compared in constant time, so that a token cannot be guessed letter by letter."""
    matches = [hmac.compare_digest(token.encode(), invite.encode()) for invite in settings.invites]
    return any(matches)


def admit(connection: Connection, node: str, public: bytes, ask: Register, now: float) -> str:
    """Remember a key, or refresh what it says of its machine. Its record stays what it is."""
    said = {
        "name": ask.name or readable_name(node),
        "role": ask.role,
        "engine": ask.engine,
        "profile": ask.profile,
        "hardware": json.dumps(msgspec.to_builtins(ask.hardware)),
        "url": ask.url if ask.role == "relay" else "",
        "seen_at": now,
    }
    row = connection.execute(NODES.select().where(NODES.c.node == node)).first()
    if row is not None:
        connection.execute(NODES.update().where(NODES.c.node == node).values(said))
        return row.status
    status = first("node")
    blank = msgspec.msgpack.encode(NodeRecord())
    fresh = {"node": node, "public": public, "status": status, "registered_at": now, "record": blank}
    connection.execute(NODES.insert().values(said | fresh))
    record(connection, "node", [node], "", status, now, name=said["name"], role=ask.role)
    return status
