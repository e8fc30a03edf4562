"""The tables. Every row with a life has a `status` with a CHECK, and every change of it an event."""

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Float, Index, Integer, LargeBinary, MetaData, Table, Text

from farflung.protocol import states

metadata = MetaData()

LIVE_ROLLOUT = tuple(status for status in states.statuses("rollout") if status not in states.REOPENING)
"""Statuses in which a rollout owns its sample; the unique index makes two owners impossible."""

GIVEN_UP = "(status IN ('returned', 'expired') OR is_partial)"
"""Of a lease: its node left samples to others."""
UNDECIDED = "outcome IS NULL AND status != 'cancelled'"
"""Of an audit: a verdict may come of it yet."""

SEEN = "seen_step >= 0"
"""Of a task: a committed step took a group of it."""

STAYED = """"before" = "after" AND noun IN ('node', 'run')"""
"""Of an event: nothing changed its status, so it is a remark, perhaps a warning."""


def _status(noun: str) -> list[sa.schema.SchemaItem]:
    allowed = ", ".join(f"'{status}'" for status in states.statuses(noun))
    return [
        Column("status", Text, nullable=False),
        sa.CheckConstraint(f"status IN ({allowed})", name=f"{noun}_status"),
    ]


RUNS = Table(
    "runs",
    metadata,
    Column("run", Text, primary_key=True),
    *_status("run"),
    Column("config", Text, nullable=False),
    Column("secret", LargeBinary, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("breaker", Text, nullable=False, default=""),
    Column("breaker_profiles", Text, nullable=False, server_default=sa.text("'{}'")),
    Column("breaker_after", Integer, nullable=False, default=0),
    Column("noise", Text, nullable=False, server_default=sa.text("'farflung'")),
)
NODES = Table(
    "nodes",
    metadata,
    Column("node", Text, primary_key=True),
    Column("public", LargeBinary, nullable=False),
    Column("name", Text, nullable=False),
    Column("role", Text, nullable=False),
    *_status("node"),
    Column("engine", Text, nullable=False),
    Column("profile", Text, nullable=False),
    Column("hardware", Text, nullable=False),
    Column("url", Text, nullable=False, default=""),
    Column("record", LargeBinary, nullable=False),
    Column("phase", Text, nullable=False, default=""),
    Column("loaded_step", Integer, nullable=False, default=-1),
    Column("tokens_per_s", Float, nullable=False, default=0.0),
    Column("registered_at", Float, nullable=False),
    Column("seen_at", Float, nullable=False),
    Column("receipt", Text, nullable=False, default=""),
    Column("heartbeat", LargeBinary, nullable=False, default=b""),
    Index("nodes_by_status", "status", "role"),
)
TASKS = Table(
    "tasks",
    metadata,
    Column("task", Text, primary_key=True),
    Column("run", Text, nullable=False),
    Column("split", Text, nullable=False),
    Column("position", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("prompt", Text, nullable=False),
    Column("prompt_ids", LargeBinary, nullable=False),
    Column("target", Integer, nullable=False, default=0),
    Column("tried", Float, nullable=False, default=0.0),
    Column("right", Float, nullable=False, default=0.0),
    Column("tokens", Float, nullable=False, default=0.0),
    Column("seen_step", Integer, nullable=False, default=-1, server_default=sa.text("-1")),
    Index("task_position", "run", "split", "position", unique=True),
    Index(
        "task_seen",
        *("run", "seen_step", "position", "tried", "right", "tokens"),
        sqlite_where=sa.text(SEEN),
        postgresql_where=sa.text(SEEN),
    ),
)
STEPS = Table(
    "steps",
    metadata,
    Column("id", Text, primary_key=True),
    Column("run", Text, nullable=False),
    Column("step", Integer, nullable=False),
    *_status("step"),
    Column("claimed_at", Float, nullable=False),
    Column("committed_at", Float),
    Column("seen_groups", Integer, nullable=False, default=0),
    Column("seen_reward", Float, nullable=False, default=0.0),
    Column("manifest_digest", Text),
    Column("manifest", LargeBinary),
    Column("weights_digest", Text),
    Column("checkpoint", Text),
    Column("metrics", Text),
    Column("probe", LargeBinary),
    Column("probe_before", LargeBinary),
    Column("canaries", LargeBinary),
    Column("restores", Integer),
    Column("open_groups", Integer, nullable=False, default=0),
    Column("drawn", LargeBinary),  # the tasks that the curriculum drew for this policy, and why
    Index("step_of_run", "run", "step", unique=True),
)
GROUPS = Table(
    "groups",
    metadata,
    Column("group", Text, primary_key=True),
    Column("run", Text, nullable=False),
    Column("task", Text, sa.ForeignKey("tasks.task"), nullable=False),
    Column("step", Integer, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("samples", Integer, nullable=False),
    Column("free", Integer, nullable=False),
    *_status("group"),
    Column("opened_at", Float, nullable=False),
    Column("batch_step", Integer),
    Column("reward", Float),
    Column("is_informative", sa.Boolean),
    Index("group_of_run", "run", "purpose", "status", "step", "is_informative"),
    Index("group_batch", "run", "batch_step"),
    Index(
        "group_free",
        "run",
        "purpose",
        "step",
        sqlite_where=sa.text("status = 'open' AND free > 0"),
        postgresql_where=sa.text("status = 'open' AND free > 0"),
    ),
    Index("group_task", "task"),
)
LEASES = Table(
    "leases",
    metadata,
    Column("lease", Text, primary_key=True),
    Column("run", Text, nullable=False),
    Column("node", Text, sa.ForeignKey("nodes.node"), nullable=False),
    Column("device", Integer, nullable=False, server_default=sa.text("0")),
    Column("step", Integer, nullable=False),
    Column("purpose", Text, nullable=False),
    *_status("lease"),
    Column("opened_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("made", BigInteger, nullable=False, server_default=sa.text("0")),  # by its node's word, when last extended
    Column("fetched_bytes", BigInteger, nullable=False, server_default=sa.text("0")),
    Column("document", LargeBinary, nullable=False),
    Column("submission", Text),
    Column("receipt", LargeBinary),
    Column("is_partial", sa.Boolean, nullable=False, default=False),
    Column("is_reissued", sa.Boolean, nullable=False, default=False),  # ended with nothing, then leased to others
    Index("lease_open", "status", "expires_at"),
    Index("lease_node", "node", "status"),
    Index(
        "one_open_lease",
        "run",
        "node",
        "device",
        unique=True,
        sqlite_where=sa.text("status = 'open'"),
        postgresql_where=sa.text("status = 'open'"),
    ),
    Index("lease_recent", "run", "opened_at"),
    Index(
        "lease_given_up",
        "node",
        "opened_at",
        sqlite_where=sa.text(GIVEN_UP),
        postgresql_where=sa.text(GIVEN_UP),
    ),
    Index("lease_reissued", "run", sqlite_where=sa.text("is_reissued"), postgresql_where=sa.text("is_reissued")),
)
ROLLOUTS = Table(
    "rollouts",
    metadata,
    Column("rollout", Text, primary_key=True),
    Column("run", Text, nullable=False),
    Column("group", Text, sa.ForeignKey("groups.group"), nullable=False),
    Column("sample", Integer, nullable=False),
    Column("lease", Text, sa.ForeignKey("leases.lease"), nullable=False),
    Column("node", Text, nullable=False),
    *_status("rollout"),
    Column("is_reissue", sa.Boolean, nullable=False, default=False),
    Column("is_audited", sa.Boolean, nullable=False, default=False),
    Column("submission", Text),
    Column("position", Integer),
    Column("tokens", Integer, nullable=False, default=0),
    Column("reward", Float),
    Column("parts", Text),
    Column("answer", Text),
    Column("claimed_by", Text),
    Column("claimed_until", Float, nullable=False, default=0.0),
    Column("score_faults", Integer, nullable=False, default=0),
    Column("flips", Integer),
    Column("liked", Integer),
    Column("allowed", Float),
    Column("is_watched", sa.Boolean, nullable=False, default=False),
    Column("escrow_step", Integer),  # the latest step when its pay went into escrow; null while none of it is there
    Index(
        "one_owner",
        "group",
        "sample",
        unique=True,
        sqlite_where=sa.text(f"status IN {LIVE_ROLLOUT}"),
        postgresql_where=sa.text(f"status IN {LIVE_ROLLOUT}"),
    ),
    Index("rollout_status", "run", "status", "claimed_until"),
    Index("rollout_lease", "lease"),
    Index("rollout_submission", "submission"),
    Index("rollout_group", "group"),
    Index("rollout_node", "node", "status"),
    Index(
        "rollout_escrow",
        "run",
        "escrow_step",
        sqlite_where=sa.text("escrow_step IS NOT NULL"),
        postgresql_where=sa.text("escrow_step IS NOT NULL"),
    ),
)
SUBMISSIONS = Table(
    "submissions",
    metadata,
    Column("submission", Text, primary_key=True),
    Column("run", Text, nullable=False),
    Column("lease", Text, nullable=False),
    Column("node", Text, nullable=False),
    Column("received_at", Float, nullable=False),
    Column("rollouts", Integer, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("profile", Text, nullable=False, default=""),
    Column("generate_s", Float, nullable=False),
    Column("audit_probability", Float, nullable=False, default=1.0),
    Column("logp_blob", Text),
)
AUDITS = Table(
    "audits",
    metadata,
    Column("audit", Text, primary_key=True),
    Column("run", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("submission", Text, nullable=False),
    Column("lease", Text, nullable=False),
    Column("node", Text, nullable=False),
    *_status("audit"),
    Column("step", Integer, nullable=False),
    Column("rollouts", Text, nullable=False),
    Column("opened_at", Float, nullable=False),
    Column("claimed_by", Text),
    Column("claimed_until", Float, nullable=False, default=0.0),
    Column("evidence", LargeBinary),
    Column("outcome", Text),
    Column("tokens", Integer, nullable=False, default=0),
    Index("audit_status", "run", "status", "step"),
    Index("audit_submission", "submission"),
    Index("audit_node", "node", "status"),
    Index(
        "audit_undecided",
        "run",
        "submission",
        sqlite_where=sa.text(UNDECIDED),
        postgresql_where=sa.text(UNDECIDED),
    ),
)
CHECKS = Table(
    "checks",
    metadata,
    Column("check", Text, primary_key=True),
    Column("run", Text, nullable=False),
    Column("step", Integer, nullable=False),
    Column("validator", Text, nullable=False),
    Column("is_passed", sa.Boolean, nullable=False),
    Column("at", Float, nullable=False),
    Index("check_of_validator", "run", "step", "validator"),
)
VERDICTS = Table(
    "verdicts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run", Text, nullable=False),
    Column("node", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("step", Integer, nullable=False, default=-1),
    Column("profile", Text, nullable=False, server_default=sa.text("''")),
    Column("was_trusted", sa.Boolean, nullable=False, default=False),
    Column("submissions", Integer, nullable=False),
    Column("document", LargeBinary, nullable=False),
    Index("verdict_step", "run", "step"),
)
ENTRIES = Table(
    "entries",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("run", Text, nullable=False),
    Column("at", Float, nullable=False),
    Column("cause", Text, nullable=False),
    Column("account", Text, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Index("entry_account", "account", "at"),
    Index("entry_cause", "cause"),
)
EVENTS = Table(
    "events",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("at", Float, nullable=False),
    Column("noun", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("before", Text, nullable=False),
    Column("after", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Index("event_subject", "subject"),
    Index("event_warning", "id", sqlite_where=sa.text(STAYED), postgresql_where=sa.text(STAYED)),
)


def _count(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False, default=0)


# Sums of the tables above; `store/counts.py` has the triggers that keep them.
ROLLOUT_COUNTS = Table(
    "rollout_counts",
    metadata,
    Column("run", Text, primary_key=True),
    Column("node", Text, primary_key=True),
    Column("status", Text, primary_key=True),
    _count("count"),
    _count("scored"),  # with a reward
    _count("tokens"),  # of those
    sqlite_with_rowid=False,
)
GROUP_COUNTS = Table(
    "group_counts",
    metadata,
    Column("run", Text, primary_key=True),
    Column("purpose", Text, primary_key=True),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("status", Text, primary_key=True),
    _count("count"),
    sqlite_with_rowid=False,
)
AUDIT_COUNTS = Table(
    "audit_counts",
    metadata,
    Column("run", Text, primary_key=True),
    Column("node", Text, primary_key=True),
    Column("status", Text, primary_key=True),
    _count("count"),
    sqlite_with_rowid=False,
)
BALANCES = Table(
    "balances",
    metadata,
    Column("account", Text, primary_key=True),
    _count("tokens"),
    _count("entries"),
    sqlite_with_rowid=False,
)

TABLE_OF = {
    "run": RUNS,
    "node": NODES,
    "step": STEPS,
    "group": GROUPS,
    "lease": LEASES,
    "rollout": ROLLOUTS,
    "audit": AUDITS,
}
