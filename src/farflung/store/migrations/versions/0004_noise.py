"""Migration: a run says which noise it samples with; those of before have another than today's."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("runs", sa.Column("noise", sa.Text(), nullable=False, server_default=sa.text("'farflung'")))


def downgrade() -> None:
    op.drop_column("runs", "noise")
