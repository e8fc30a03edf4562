"""Migration: the circuit breaker opens for single numerics profiles, and verdicts say under which they were given."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("runs", sa.Column("breaker_profiles", sa.Text(), nullable=False, server_default=sa.text("'{}'")))
    op.add_column("verdicts", sa.Column("profile", sa.Text(), nullable=False, server_default=sa.text("''")))


def downgrade() -> None:
    op.drop_column("verdicts", "profile")
    op.drop_column("runs", "breaker_profiles")
