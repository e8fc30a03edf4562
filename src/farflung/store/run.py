"""One run as the coordinator keeps it: the values that never change, and the few questions every hop asks of it."""

import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.config import Config
from farflung.protocol import seeds
from farflung.protocol.errors import Ejected, NotFound
from farflung.protocol.identity import Key, node_id
from farflung.protocol.messages import Latest
from farflung.protocol.stops import Stops
from farflung.store.sql_connections import file_of, reading
from farflung.store.tables import NODES, RUNS, STEPS, TASKS
from farflung.store.transitions import memo


@dataclass(frozen=True)
class RunContext:
    """A run's name, configuration, secret, signing key, vocabulary and tasks."""

    run: str
    config: Config
    secret: bytes
    key: Key
    vocab: int
    eos_ids: frozenset[int]
    tasks: tuple[tuple[str, int], ...]
    """Training tasks by position: id and number of prompt tokens."""
    receipts: Key
    """The key that receipts are signed with."""
    verdicts: Key
    """The key that verdicts are signed with."""
    stops: Stops | None = None
    """With which token a stop string is complete, in a run that has some."""
    quantised: frozenset[str] = frozenset()
    """Numerics profiles of nodes that quantise the published weights."""
    task_orders: dict[int, Any] = field(default_factory=dict[int, Any], compare=False, repr=False)
    """How far the tasks of recent steps are opened, so that no lease needs a look from the beginning."""

    faults: dict[str, int] = field(default_factory=dict[str, int], compare=False, repr=False)
    """Kinds of faults in scoring that were told of, and how many rollouts could not be scored before any was."""

    @property
    def ending(self) -> tuple[int, frozenset[int], Stops | None]:
        """The ids that a rollout may have and how it ends: vocabulary, end tokens, stop strings."""
        return self.vocab, self.eos_ids, self.stops

    @cached_property
    def granted(self) -> dict[str, str]:
        """Node → the role that the operator granted its key."""
        return {node_id(bytes.fromhex(key)): role for key, role in self.config.coordinator.grants.items()}

    def suspect_profiles(self, connection: Connection) -> dict[str, str]:
        """Numerics profiles for which alone the circuit breaker is open, and why."""
        return json.loads(connection.execute(_SUSPECT, {"run": self.run}).scalar_one())

    def step_secret(self, step: int) -> bytes:
        """The secret that everything drawn at a step derives from."""
        return step_secret(self.secret, step)

    def status(self, connection: Connection) -> str:
        """running, finishing or finished."""
        return connection.execute(_STATUS, {"run": self.run}).scalar_one()

    def latest(self, connection: Connection) -> Latest:
        """The newest committed step."""
        return memo(connection, ("latest", self.run), lambda: self._latest(connection))

    def _latest(self, connection: Connection) -> Latest:
        row = connection.execute(_NEWEST, {"run": self.run}).first()
        step, manifest = (row.step, row.manifest_digest) if row else (-1, "")
        return Latest(status=self.status(connection), step=step, manifest=manifest)

    def manifest_of(self, connection: Connection, step: int) -> str:
        """Digest of the sealed manifest of a committed step."""
        return memo(connection, ("manifest", self.run, step), lambda: self._manifest_of(connection, step))

    def _manifest_of(self, connection: Connection, step: int) -> str:
        query = sa.select(STEPS.c.manifest_digest).where(STEPS.c.run == self.run, STEPS.c.step == step)
        digest = connection.execute(query).scalar_one_or_none()
        if digest is None:
            raise NotFound(f"step {step} of run {self.run!r} has no weights yet")
        return digest


# asked within nearly every transaction, so built once
_STATUS = sa.select(RUNS.c.status).where(RUNS.c.run == sa.bindparam("run"))
_SUSPECT = sa.select(RUNS.c.breaker_profiles).where(RUNS.c.run == sa.bindparam("run"))
_NEWEST = (
    sa.select(STEPS.c.step, STEPS.c.manifest_digest)
    .where(STEPS.c.run == sa.bindparam("run"), STEPS.c.status == "committed")
    .order_by(STEPS.c.step.desc())
    .limit(1)
)


@lru_cache(maxsize=64)
def step_secret(run_secret: bytes, step: int) -> bytes:
    """`seeds.step_secret`, remembered."""
    return seeds.step_secret(run_secret, step)


def holds_run(url: str, run: str) -> bool:
    """Whether the database at `url` has this run; it is left as it is. Raises ConfigError if it cannot be read."""
    if (file := file_of(url)) and not file.exists():
        return False
    with reading(url) as connection:
        if not sa.inspect(connection).has_table(RUNS.name):
            return False
        return connection.execute(sa.select(RUNS.c.run).where(RUNS.c.run == run)).first() is not None


def new_id(letter: str) -> str:
    """A fresh random id whose first letter tells its noun."""
    return letter + secrets.token_hex(6)


_NODE = sa.select(NODES).where(NODES.c.node == sa.bindparam("id"))


def node_row(connection: Connection, node: str) -> Row[tuple[object, ...]]:
    """A registered node. Raises NotFound."""
    row = connection.execute(_NODE, {"id": node}).first()
    if row is None:
        raise unknown_node(node)
    return row


_NODES = sa.select(NODES).where(NODES.c.node.in_(sa.bindparam("ids", expanding=True)))


def node_rows(connection: Connection, nodes: Iterable[str]) -> dict[str, Row[Any]]:
    """Those of these nodes that are registered, by id."""
    return {row.node: row for row in connection.execute(_NODES, {"ids": list(nodes)})}


def unknown_node(node: str) -> NotFound:
    """The error for a node that is not registered."""
    return NotFound(f"node {node} is not registered here; POST /v1/nodes first")


def ejected(node: str) -> Ejected:
    """The error for an ejected node, whatever it asks for and in whichever role."""
    return Ejected(f"node {node} was ejected for failing verification; GET /v1/story/{node} says why")


def train_tasks(connection: Connection, run: str) -> tuple[tuple[str, int], ...]:
    """The training tasks of a run, by position."""
    query = sa.select(TASKS.c.task, sa.func.length(TASKS.c.prompt_ids)).where(
        TASKS.c.run == run, TASKS.c.split == "train"
    )
    return tuple((task, size // 4) for task, size in connection.execute(query.order_by(TASKS.c.position)))
