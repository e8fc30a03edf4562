"""Context of a coordinator's routes: the run's records, stores, clock, access, waiting requests."""

import re
import time
from collections.abc import Awaitable, Callable, Sequence
from types import MethodType
from typing import TypeVar

from sqlalchemy import Connection

from farflung.config import Config
from farflung.coordinator.access import AccessControl
from farflung.coordinator.glance import Glance
from farflung.coordinator.long_poll import LongPoll
from farflung.coordinator.twins import Twins
from farflung.net.server import Call
from farflung.protocol import messages as m
from farflung.protocol.errors import Malformed, NotFound, Refusal
from farflung.protocol.identity import Trusted
from farflung.queries import versions, views
from farflung.queries.shared import Shared
from farflung.rollouts.archive import Archive
from farflung.store.blobs import Blobs
from farflung.store.db import Database
from farflung.store.metrics import Metrics
from farflung.store.run import RunContext
from farflung.trust.evidence import Profiles

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")


class Context:
    """The run as `tasks/create_run.py` creates it. `descriptor` is what nodes check before they join."""

    def __init__(
        self,
        run_ctx: RunContext,
        descriptor: m.Run,
        weights_keys: Trusted,
        profiles: Profiles,
        archive: Archive,
        database: Database,
        blobs: Blobs,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        admin_token: str = "",
    ) -> None:
        self.run_ctx, self.descriptor, self.weights_keys, self.profiles = run_ctx, descriptor, weights_keys, profiles
        self.archive, self.database, self.blobs, self.metrics, self.clock = archive, database, blobs, metrics, clock
        self.access = AccessControl(run_ctx.granted, run_ctx.key.id, admin_token, self.config.coordinator)
        self.long_poll, self.twins = LongPoll(), Twins()
        self.glance = Shared(lambda: database.read_page(lambda c: Glance(views.status(c, run_ctx, clock()))))
        self.weights = Shared(lambda: database.read_page(lambda c: versions.versions(c, run_ctx, clock())))
        self.collected_step = 0
        """The shards of versions before this one are deleted."""

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.run_ctx.config

    def here(self, call: Call) -> None:
        """Raises NotFound for another run than this one."""
        if call.path.get("run", self.run_ctx.run) != self.run_ctx.run:
            raise NotFound(f"there is no run {call.path['run']!r} here; there is {self.run_ctx.run!r}")

    def require(self, call: Call, role: str) -> None:
        """This run, and a node that was granted this role. Raises NotFound or Forbidden."""
        self.here(call)
        self.access.require(call, role)

    def require_operator(self, call: Call) -> None:
        """This run, and its operator. Raises NotFound or Forbidden."""
        self.here(call)
        self.access.require_operator(call)

    def gate(self, role: str, limit_bytes: int) -> Callable[[Call], Awaitable[int]]:
        """For routes with large bodies: a role, and how many bytes it may send."""

        async def gate(call: Call) -> int:
            self.require(call, role)
            return limit_bytes

        return gate

    async def write(self, change: Callable[[Connection], T]) -> T:
        """A transaction; callers that poll for work look again after it."""
        result = await self.database.write(change)
        self.long_poll.wake()
        return result

    async def write_together(
        self, serve: Callable[["Context", Connection, Sequence[A]], list[B | Refusal]], item: A
    ) -> B:
        """A request of a kind that is served in sets, many in one transaction (see `store/db.py`); wakes no caller."""
        return await self.database.write_together(MethodType(serve, self), item)


def digest_in(call: Call) -> str:
    """The digest that the path names. Raises Malformed."""
    digest = call.path["digest"]
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise Malformed(f"{digest[:80]!r} is no digest in hex")
    return digest


def number_in(call: Call, name: str) -> int:
    """A number that the path names. Raises Malformed."""
    text = call.path[name]
    if not re.fullmatch(r"\d{1,9}", text):
        raise Malformed(f"{name} {text[:40]!r} is not a number")
    return int(text)
