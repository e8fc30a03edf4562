"""Migration: the first schema."""

import sqlalchemy as sa
from alembic import op

from farflung.store import counts

revision = "0002"
down_revision = None
TABLES = [
    "balances",
    "audit_counts",
    "group_counts",
    "rollout_counts",
    "rollouts",
    "leases",
    "groups",
    "verdicts",
    "tasks",
    "submissions",
    "steps",
    "runs",
    "nodes",
    "events",
    "entries",
    "checks",
    "audits",
]
"""Those that name others first."""


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "audits",
        sa.Column("audit", sa.Text(), nullable=False),
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("submission", sa.Text(), nullable=False),
        sa.Column("lease", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("rollouts", sa.Text(), nullable=False),
        sa.Column("opened_at", sa.Float(), nullable=False),
        sa.Column("claimed_by", sa.Text(), nullable=True),
        sa.Column("claimed_until", sa.Float(), nullable=False),
        sa.Column("evidence", sa.LargeBinary(), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.CheckConstraint("status IN ('open', 'claimed', 'done', 'cancelled')", name="audit_status"),
        sa.PrimaryKeyConstraint("audit"),
    )
    op.create_index("audit_status", "audits", ["run", "status", "step"], unique=False)
    op.create_index("audit_node", "audits", ["node", "status"], unique=False)
    op.create_index("audit_submission", "audits", ["submission"], unique=False)
    op.create_index(
        "audit_undecided",
        "audits",
        ["run", "submission"],
        unique=False,
        sqlite_where=sa.text("outcome IS NULL AND status != 'cancelled'"),
        postgresql_where=sa.text("outcome IS NULL AND status != 'cancelled'"),
    )
    op.create_table(
        "checks",
        sa.Column("check", sa.Text(), nullable=False),
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("validator", sa.Text(), nullable=False),
        sa.Column("is_passed", sa.Boolean(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("check"),
    )
    op.create_index("check_of_validator", "checks", ["run", "step", "validator"], unique=False)
    op.create_table(
        "entries",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("entry_account", "entries", ["account", "at"], unique=False)
    op.create_index("entry_cause", "entries", ["cause"], unique=False)
    op.create_table(
        "events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("noun", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("before", sa.Text(), nullable=False),
        sa.Column("after", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("event_subject", "events", ["subject"], unique=False)
    op.create_index(
        "event_warning",
        "events",
        ["id"],
        unique=False,
        sqlite_where=sa.text("\"before\" = \"after\" AND noun IN ('node', 'run')"),
        postgresql_where=sa.text("\"before\" = \"after\" AND noun IN ('node', 'run')"),
    )
    op.create_table(
        "nodes",
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("public", sa.LargeBinary(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("engine", sa.Text(), nullable=False),
        sa.Column("profile", sa.Text(), nullable=False),
        sa.Column("hardware", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("loaded_step", sa.Integer(), nullable=False),
        sa.Column("tokens_per_s", sa.Float(), nullable=False),
        sa.Column("registered_at", sa.Float(), nullable=False),
        sa.Column("seen_at", sa.Float(), nullable=False),
        sa.Column("receipt", sa.Text(), nullable=False),
        sa.Column("heartbeat", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint("status IN ('probation', 'trusted', 'quarantined', 'ejected')", name="node_status"),
        sa.PrimaryKeyConstraint("node"),
    )
    op.create_index("nodes_by_status", "nodes", ["status", "role"], unique=False)
    op.create_table(
        "runs",
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("breaker", sa.Text(), nullable=False),
        sa.Column("breaker_after", sa.Integer(), nullable=False),
        sa.CheckConstraint("status IN ('running', 'finishing', 'finished')", name="run_status"),
        sa.PrimaryKeyConstraint("run"),
    )
    op.create_table(
        "steps",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("claimed_at", sa.Float(), nullable=False),
        sa.Column("committed_at", sa.Float(), nullable=True),
        sa.Column("seen_groups", sa.Integer(), nullable=False),
        sa.Column("seen_reward", sa.Float(), nullable=False),
        sa.Column("manifest_digest", sa.Text(), nullable=True),
        sa.Column("manifest", sa.LargeBinary(), nullable=True),
        sa.Column("weights_digest", sa.Text(), nullable=True),
        sa.Column("checkpoint", sa.Text(), nullable=True),
        sa.Column("metrics", sa.Text(), nullable=True),
        sa.Column("probe", sa.LargeBinary(), nullable=True),
        sa.Column("probe_before", sa.LargeBinary(), nullable=True),
        sa.Column("canaries", sa.LargeBinary(), nullable=True),
        sa.Column("restores", sa.Integer(), nullable=True),
        sa.Column("open_groups", sa.Integer(), nullable=False),
        sa.CheckConstraint("status IN ('open', 'committed')", name="step_status"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("step_of_run", "steps", ["run", "step"], unique=True)
    op.create_table(
        "submissions",
        sa.Column("submission", sa.Text(), nullable=False),
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("lease", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("received_at", sa.Float(), nullable=False),
        sa.Column("rollouts", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("profile", sa.Text(), nullable=False),
        sa.Column("generate_s", sa.Float(), nullable=False),
        sa.Column("audit_probability", sa.Float(), nullable=False),
        sa.Column("logp_blob", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("submission"),
    )
    op.create_table(
        "tasks",
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("prompt_ids", sa.LargeBinary(), nullable=False),
        sa.Column("target", sa.Integer(), nullable=False),
        sa.Column("tried", sa.Float(), nullable=False),
        sa.Column("right", sa.Float(), nullable=False),
        sa.Column("tokens", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("task"),
    )
    op.create_index("task_position", "tasks", ["run", "split", "position"], unique=True)
    op.create_table(
        "verdicts",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("was_trusted", sa.Boolean(), nullable=False),
        sa.Column("submissions", sa.Integer(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("verdict_step", "verdicts", ["run", "step"], unique=False)
    op.create_table(
        "groups",
        sa.Column("group", sa.Text(), nullable=False),
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.Column("free", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("opened_at", sa.Float(), nullable=False),
        sa.Column("batch_step", sa.Integer(), nullable=True),
        sa.Column("reward", sa.Float(), nullable=True),
        sa.Column("is_informative", sa.Boolean(), nullable=True),
        sa.CheckConstraint("status IN ('open', 'complete', 'batched', 'trained', 'dropped')", name="group_status"),
        sa.ForeignKeyConstraint(
            ["task"],
            ["tasks.task"],
        ),
        sa.PrimaryKeyConstraint("group"),
    )
    op.create_index("group_batch", "groups", ["run", "batch_step"], unique=False)
    op.create_index("group_task", "groups", ["task"], unique=False)
    op.create_index(
        "group_free",
        "groups",
        ["run", "purpose", "step"],
        unique=False,
        sqlite_where=sa.text("status = 'open' AND free > 0"),
        postgresql_where=sa.text("status = 'open' AND free > 0"),
    )
    op.create_index("group_of_run", "groups", ["run", "purpose", "status", "step"], unique=False)
    op.create_table(
        "leases",
        sa.Column("lease", sa.Text(), nullable=False),
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("opened_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("submission", sa.Text(), nullable=True),
        sa.Column("receipt", sa.LargeBinary(), nullable=True),
        sa.Column("is_partial", sa.Boolean(), nullable=False),
        sa.Column("is_reissued", sa.Boolean(), nullable=False),
        sa.CheckConstraint("status IN ('open', 'submitted', 'returned', 'expired', 'void')", name="lease_status"),
        sa.ForeignKeyConstraint(
            ["node"],
            ["nodes.node"],
        ),
        sa.PrimaryKeyConstraint("lease"),
    )
    op.create_index("lease_node", "leases", ["node", "status"], unique=False)
    op.create_index(
        "one_open_lease",
        "leases",
        ["run", "node"],
        unique=True,
        sqlite_where=sa.text("status = 'open'"),
        postgresql_where=sa.text("status = 'open'"),
    )
    op.create_index("lease_recent", "leases", ["run", "opened_at"], unique=False)
    op.create_index("lease_open", "leases", ["status", "expires_at"], unique=False)
    op.create_index(
        "lease_given_up",
        "leases",
        ["node", "opened_at"],
        unique=False,
        sqlite_where=sa.text("(status IN ('returned', 'expired') OR is_partial)"),
        postgresql_where=sa.text("(status IN ('returned', 'expired') OR is_partial)"),
    )
    op.create_index(
        "lease_reissued",
        "leases",
        ["run"],
        unique=False,
        sqlite_where=sa.text("is_reissued"),
        postgresql_where=sa.text("is_reissued"),
    )
    op.create_table(
        "rollouts",
        sa.Column("rollout", sa.Text(), nullable=False),
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("group", sa.Text(), nullable=False),
        sa.Column("sample", sa.Integer(), nullable=False),
        sa.Column("lease", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("is_reissue", sa.Boolean(), nullable=False),
        sa.Column("is_audited", sa.Boolean(), nullable=False),
        sa.Column("submission", sa.Text(), nullable=True),
        sa.Column("position", sa.Integer(), nullable=True),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("reward", sa.Float(), nullable=True),
        sa.Column("parts", sa.Text(), nullable=True),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("claimed_by", sa.Text(), nullable=True),
        sa.Column("claimed_until", sa.Float(), nullable=False),
        sa.Column("score_faults", sa.Integer(), nullable=False),
        sa.Column("flips", sa.Integer(), nullable=True),
        sa.Column("liked", sa.Integer(), nullable=True),
        sa.Column("allowed", sa.Float(), nullable=True),
        sa.Column("is_watched", sa.Boolean(), nullable=False),
        sa.Column("escrow_step", sa.Integer(), nullable=True),
        sa.CheckConstraint(
            "status IN ('leased', 'received', 'held', 'accepted', 'batched', 'expired', 'rejected', 'void', 'dropped', 'trained')",
            name="rollout_status",
        ),
        sa.ForeignKeyConstraint(
            ["group"],
            ["groups.group"],
        ),
        sa.ForeignKeyConstraint(
            ["lease"],
            ["leases.lease"],
        ),
        sa.PrimaryKeyConstraint("rollout"),
    )
    op.create_index(
        "one_owner",
        "rollouts",
        ["group", "sample"],
        unique=True,
        sqlite_where=sa.text("status IN ('leased', 'received', 'held', 'accepted', 'batched', 'dropped', 'trained')"),
        postgresql_where=sa.text(
            "status IN ('leased', 'received', 'held', 'accepted', 'batched', 'dropped', 'trained')"
        ),
    )
    op.create_index("rollout_lease", "rollouts", ["lease"], unique=False)
    op.create_index("rollout_group", "rollouts", ["group"], unique=False)
    op.create_index("rollout_node", "rollouts", ["node", "status"], unique=False)
    op.create_index("rollout_status", "rollouts", ["run", "status", "claimed_until"], unique=False)
    op.create_index("rollout_submission", "rollouts", ["submission"], unique=False)
    op.create_index(
        "rollout_escrow",
        "rollouts",
        ["run", "escrow_step"],
        unique=False,
        sqlite_where=sa.text("escrow_step IS NOT NULL"),
        postgresql_where=sa.text("escrow_step IS NOT NULL"),
    )
    op.create_table(
        "rollout_counts",
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("scored", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("run", "node", "status"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "group_counts",
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("run", "purpose", "step", "status"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "audit_counts",
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("run", "node", "status"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "balances",
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("entries", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("account"),
        sqlite_with_rowid=False,
    )
    counts.install(op.get_bind())


def downgrade() -> None:
    """Take back; a table takes its indexes along."""
    counts.remove(op.get_bind())
    for table in TABLES:
        op.drop_table(table)
