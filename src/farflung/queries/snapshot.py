"""Everything the home page shows, read in one go. Read only."""

import json
from collections import Counter
from dataclasses import dataclass, replace

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.config import Config
from farflung.protocol.messages import EvalView, StepView, Verdict
from farflung.queries import evals as heldout
from farflung.queries import views
from farflung.queries.cost import Meter
from farflung.queries.node_views import NodeLine, Tally, lines, tally
from farflung.queries.redact import pathless, redaction_of
from farflung.store.ledger import ISSUED
from farflung.store.tables import AUDITS, BALANCES, ENTRIES, GROUP_COUNTS, RUNS, STEPS

RATE_S = 600.0
"""The rate of accepted rollouts is taken over the last ten minutes."""
VERDICTS = 50


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment."""

    run: str
    status: str
    model: str
    env: str
    step: int
    """Latest published step, -1 before the first."""
    steps_total: int
    started_at: float
    now: float
    wall_s: float
    steps: list[StepView]
    evals: list[EvalView]
    nodes: list[NodeLine]
    counts: Tally
    groups: dict[str, int]
    groups_wanted: int
    audits_waiting: int | None
    """None where that is hidden."""
    breaker: str
    """Why verdicts and training are held, empty if they are not."""
    breaker_profiles: dict[str, str]
    """Why nodes under some numerics profiles get no work, by profile."""
    catch: dict[int, float]
    """P(caught within n submissions) of the cheat of `views.catch`."""
    accepted_per_hour: float
    leases_reissued: int
    cost_usd: float
    overhead: float | None
    verdicts: list[Verdict]
    """Newest first."""

    @property
    def workers(self) -> list[NodeLine]:
        """Those that generate."""
        return [node for node in self.nodes if node.is_worker]

    def of(self, role: str) -> list[NodeLine]:
        """Nodes of a role that are here."""
        return [node for node in self.nodes if node.role == role and node.is_present]

    @property
    def online(self) -> int:
        """Workers that are here."""
        return sum(node.is_present and node.status != "ejected" for node in self.workers)

    @property
    def accepted(self) -> int:
        """Rollouts accepted from workers that are not ejected."""
        return sum(node.accepted for node in self.workers if node.status != "ejected")

    @property
    def rejected(self) -> int:
        """Rollouts rejected or void."""
        return sum(node.rejected for node in self.nodes)

    @property
    def names(self) -> dict[str, str]:
        """Name of each node by id."""
        return {node.node: node.name for node in self.nodes}

    @property
    def staleness(self) -> float | None:
        """Mean steps between the policy that generated and the one trained, in the last step."""
        return self.steps[-1].metrics.get("staleness") if self.steps else None

    @property
    def phase(self) -> str:
        """The run's present work, in a few words."""
        if self.status != "running":
            return self.status
        trainer = next(iter(self.of("trainer")), None)
        if trainer is None:
            return "waiting for a trainer"
        return "gathering rollouts" if trainer.state in ("waiting", "starting") else trainer.phase

    @property
    def worker_states(self) -> list[tuple[str, int]]:
        """How many workers are in which state, most first; those that left are left out."""
        states = Counter(node.state for node in self.workers if node.state not in ("gone", "silent", "ejected"))
        return states.most_common()

    @property
    def waits(self) -> str:
        """Which role waits for which, in a sentence."""
        return _waits(self)


def take(connection: Connection, config: Config, meter: Meter, now: float) -> Snapshot:
    """Read the run as it stands."""
    run = config.run.name
    row = connection.execute(sa.select(RUNS).where(RUNS.c.run == run)).one()
    committed = sa.select(sa.func.max(STEPS.c.step)).where(STEPS.c.run == run, STEPS.c.status == "committed")
    step = connection.execute(committed).scalar()
    latest = -1 if step is None else step
    counts, redaction = tally(connection, run), redaction_of(connection, config)
    cost, overhead, wall_s = meter.read()
    waiting = sa.select(sa.func.count()).where(AUDITS.c.run == run, AUDITS.c.status.in_(("open", "claimed")))
    since = row.created_at if row.status == "finished" else max(row.created_at, now - RATE_S)
    return Snapshot(
        run=run,
        status=row.status,
        model=pathless(config.model.path),
        env=pathless(config.env.name),
        step=latest,
        steps_total=config.run.steps,
        started_at=row.created_at,
        now=now,
        wall_s=wall_s,
        steps=views.steps(connection, run),
        evals=heldout.shown(connection, config),
        nodes=lines(connection, config, counts, latest, now, redaction),
        counts=replace(counts, statuses=redaction.counts(counts.statuses)),
        groups=views.counts_of(connection, GROUP_COUNTS, run, GROUP_COUNTS.c.purpose == "train"),
        groups_wanted=config.learn.groups,
        audits_waiting=None if redaction.is_on else connection.execute(waiting).scalar_one(),
        breaker=row.breaker,
        breaker_profiles=json.loads(row.breaker_profiles),
        catch=views.catch(connection, config),
        accepted_per_hour=_accepted(connection, None if since == row.created_at else since)
        * 3600
        / max(1.0, now - since),
        leases_reissued=views.reissued(connection, run),
        cost_usd=cost,
        overhead=overhead,
        verdicts=views.verdicts(connection, run, latest=VERDICTS),
    )


def _accepted(connection: Connection, since: float | None) -> int:
    """Rollouts accepted since a time or ever: each has one entry in the account that issues credit."""
    if since is None:
        query = sa.select(BALANCES.c.entries).where(BALANCES.c.account == ISSUED)
    else:
        query = sa.select(sa.func.count()).where(ENTRIES.c.account == ISSUED, ENTRIES.c.at >= since)
    return connection.execute(query).scalar() or 0


def _waits(s: Snapshot) -> str:
    if s.status == "finished":
        return "The run is finished; no role waits."
    if s.breaker:
        return f"The circuit breaker is open: {s.breaker}."
    trainers = s.of("trainer")
    if not trainers:
        return "No trainer is here: rollouts pile up until one comes back."
    if s.online == 0:
        return "No worker is here: the trainer waits for rollouts. Lend a machine with: farflung join and this address."
    if trainers[0].state in ("waiting", "starting"):
        return _trainer_waits(s)
    idle = dict(s.worker_states).get("waiting", 0)
    if idle * 2 > s.online:
        return f"{idle} of {s.online} workers wait for the trainer: enough is generated ahead of {trainers[0].phase}."
    return f"No role waits: the trainer is {trainers[0].phase} while workers generate what follows."


def _trainer_waits(s: Snapshot) -> str:
    ready = s.groups.get("complete", 0)
    held, received = s.counts.statuses.get("held", 0), s.counts.statuses.get("received", 0)
    text = (
        f"The trainer waits for workers: {ready} complete groups of the {s.groups_wanted} with variance that it needs"
    )
    states = dict(s.worker_states)
    lent = states.get("suspended", 0) + states.get("vacated", 0)
    behind = [f"{held} rollouts wait for an audit" if held else "", f"{received} for a score" if received else ""]
    behind += [f"{lent} of {s.online} workers stopped for the owners of their machines" if lent else ""]
    reasons = " and ".join(part for part in behind if part)
    return f"{text}; {reasons}." if reasons else f"{text}."
