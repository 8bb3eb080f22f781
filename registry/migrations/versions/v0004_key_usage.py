"""Format 4: what API keys have used, and what their requests in progress have reserved."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add two empty tables; existing tables are unchanged."""
    op.create_table(
        "key_usage",
        sa.Column("key", sa.String(12), nullable=False),
        sa.Column("what", sa.String(8), nullable=False),
        sa.Column("per", sa.String(8), nullable=False),
        sa.Column("begins", sa.Integer, nullable=False),
        sa.Column("used", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("key", "what", "per", "begins", name="pk_key_usage"),
    )
    op.create_table(
        "key_reservations",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("key", sa.String(12), nullable=False, index=True),
        sa.Column("what", sa.String(8), nullable=False),
        sa.Column("amount", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", "what", name="pk_key_reservations"),
    )
    state = sa.table("registry_state", sa.column("schema", sa.Integer))
    op.execute(state.update().values(schema=4))
