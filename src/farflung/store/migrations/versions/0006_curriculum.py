"""Migration: a step keeps the tasks that were drawn for it, and a task the last step that took a group of it."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
SEEN = sa.text("seen_step >= 0")


def upgrade() -> None:
    op.add_column("tasks", sa.Column("seen_step", sa.Integer(), nullable=False, server_default=sa.text("-1")))
    op.add_column("steps", sa.Column("drawn", sa.LargeBinary()))
    columns = ["run", "seen_step", "position", "tried", "right", "tokens"]
    op.create_index("task_seen", "tasks", columns, sqlite_where=SEEN, postgresql_where=SEEN)
    op.drop_index("group_of_run", "groups")
    op.create_index("group_of_run", "groups", ["run", "purpose", "status", "step", "is_informative"])


def downgrade() -> None:
    op.drop_index("group_of_run", "groups")
    op.create_index("group_of_run", "groups", ["run", "purpose", "status", "step"])
    op.drop_index("task_seen", "tasks")
    op.drop_column("steps", "drawn")
    op.drop_column("tasks", "seen_step")
