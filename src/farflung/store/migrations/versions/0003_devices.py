"""Migration: a node holds a lease for each of its devices, and progress extends it."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
OPEN = sa.text("status = 'open'")


def upgrade() -> None:
    op.add_column("leases", sa.Column("device", sa.Integer(), nullable=False, server_default=sa.text("0")))
    for name in ("made", "fetched_bytes"):
        op.add_column("leases", sa.Column(name, sa.BigInteger(), nullable=False, server_default=sa.text("0")))
    op.drop_index("one_open_lease", "leases")
    op.create_index(
        "one_open_lease", "leases", ["run", "node", "device"], unique=True, sqlite_where=OPEN, postgresql_where=OPEN
    )


def downgrade() -> None:
    op.drop_index("one_open_lease", "leases")
    for name in ("device", "made", "fetched_bytes"):
        op.drop_column("leases", name)
    op.create_index("one_open_lease", "leases", ["run", "node"], unique=True, sqlite_where=OPEN, postgresql_where=OPEN)
