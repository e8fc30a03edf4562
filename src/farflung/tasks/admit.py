"""Coordinator: admit nodes by the run's rule, and remember each in a row."""

import hmac
import json
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.config import CoordinatorSection
from farflung.protocol.errors import ConfigError, Conflict, Forbidden, TooOld
from farflung.protocol.identity import readable_name
from farflung.protocol.messages import Register
from farflung.protocol.states import first
from farflung.store.run import ejected
from farflung.store.tables import LEASES, NODES
from farflung.store.transitions import move, record
from farflung.trust.evidence import Profiles
from farflung.trust.record import NodeRecord

UNTRUSTED = ("worker", "relay")
"""Roles that need no grant."""


def check(
    settings: CoordinatorSection, granted: str, node: str, ask: Register, profiles: Profiles | None = None
) -> None:
    """Whether a key may register as what it asks to be, a worker with its profile. Raises TooOld or Forbidden."""
    if ask.version < settings.minimum_version:
        raise TooOld(
            f"this node speaks protocol {ask.version}, {settings.minimum_version} is the oldest that may join; "
            "upgrade with: pip install -U farflung"
        )
    if ask.role == "worker" and profiles is not None:
        _refuse_misfit(profiles, ask)
    if ask.role not in UNTRUSTED:
        if granted != ask.role:
            raise Forbidden(f"node {node} is not granted the role {ask.role!r}; the operator grants it by config")
    elif settings.admission == "allow" and node not in settings.allow:
        raise Forbidden(f"this run admits listed nodes only; ask its operator to add {node} to coordinator.allow")
    elif settings.admission == "invite" and not _is_invited(settings, ask.invite):
        raise Forbidden("this run admits invited nodes only; join with --invite TOKEN, as its operator gave it to you")


def _refuse_misfit(profiles: Profiles, ask: Register) -> None:
    """Raise Forbidden for other numerics than a worker's profile is for: judged by it, an honest one would be ejected.

    An engine or device of which it says nothing is taken to be the profile's.
    """
    if ask.profile and ask.profile not in profiles.names:
        names = ", ".join(profiles.names)
        raise Forbidden(f"this run admits no numerics profile {ask.profile!r}; choose one of {names}")
    profile = profiles.of(ask.profile)
    if (ask.engine or profile.engine, ask.device or profile.device) != (profile.engine, profile.device):
        kinds = "; ".join(f"{one.name}: {one.text}" for one in profiles.every)
        device = ask.device or "an unknown device"
        raise Forbidden(
            f"numerics profile {profile.name!r} is for {profile.text}, but this node says it is "
            f"{ask.engine or profile.engine} on {device}; choose one that is its own ({kinds}), or measure one with "
            "`farflung calibrate --device` and have the operator name it in model.profiles"
        )


def refuse_forgotten(connection: Connection, profiles: Profiles) -> None:
    """Raise ConfigError for a profile that workers compute in and the run admits no more: by another one they would be
    judged wrongly, and the honest ejected."""
    is_at_work = sa.and_(NODES.c.role == "worker", NODES.c.status != "ejected")
    found = sa.select(NODES.c.profile).where(is_at_work, NODES.c.profile.not_in(["", *profiles.names])).distinct()
    if left := sorted(connection.execute(found).scalars()):
        raise ConfigError(
            f"nodes of this run compute in the numerics profile {left[0]!r}, which it admits no more; name it in "
            "model.profiles again"
        )


def _is_invited(settings: CoordinatorSection, token: str) -> bool:
    """Compared in constant time, so that a token cannot be guessed letter by letter."""
    matches = [hmac.compare_digest(token.encode(), invite.encode()) for invite in settings.invites]
    return any(matches)


def admit(connection: Connection, node: str, public: bytes, ask: Register, now: float) -> str:
    """Remember a key, or refresh what it says of its machine. Its record stays what it is.

    Raises Ejected for a key that was, whichever role it asks for: a relay is listed to all nodes. Raises Conflict for
    another role while a lease is open: as a relay a node would keep work that is a worker's.
    """
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
    if row is not None and row.status == "ejected":
        raise ejected(node)
    if row is not None:
        if (row.role, row.profile) != (
            ask.role,
            ask.profile,
        ):  # of two profiles it could choose after seeing both texts
            _check_idle(connection, row)
        connection.execute(NODES.update().where(NODES.c.node == node).values(said))
        return _restart(connection, row, ask, now) if row.profile != ask.profile else row.status
    status = first("node")
    blank = msgspec.msgpack.encode(NodeRecord())
    fresh = {"node": node, "public": public, "status": status, "registered_at": now, "record": blank}
    connection.execute(NODES.insert().values(said | fresh))
    record(connection, "node", [node], "", status, now, name=said["name"], role=ask.role)
    return status


def _check_idle(connection: Connection, row: Row[Any]) -> None:
    mine = sa.and_(LEASES.c.node == row.node, LEASES.c.status == "open")
    lease = connection.execute(sa.select(LEASES.c.lease).where(mine)).scalar()
    if lease is not None:
        raise Conflict(
            f"node {row.node} holds lease {lease} as a {row.role}; submit it or hand it back before you change role or "
            "profile"
        )


def _restart(connection: Connection, row: Row[Any], ask: Register, now: float) -> str:
    """Other arithmetic: its good name was earned with another one. The evidence against it stays."""
    record_ = msgspec.msgpack.decode(row.record, type=NodeRecord)
    status = "probation" if row.status == "trusted" else row.status
    fresh = msgspec.structs.replace(record_, status=status, clean_rollouts=0)
    connection.execute(NODES.update().where(NODES.c.node == row.node).values(record=msgspec.msgpack.encode(fresh)))
    if status != row.status:
        move(connection, "node", [row.node], row.status, status, now, why=f"it changed to profile {ask.profile!r}")
    return status
