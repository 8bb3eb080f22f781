"""Format 2: measurements of experts by source and skill."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add an empty table; existing tables are unchanged."""
    op.create_table(
        "profiles",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("expert", sa.String(128), nullable=False),
        sa.Column("identity", sa.String(256), nullable=False),
        sa.Column("source", sa.String(256), nullable=False),
        sa.Column("skill", sa.String(256), nullable=False),
        sa.Column("digest", sa.String(128), nullable=False),
        sa.Column("score", sa.Double, nullable=False),
        sa.Column("n", sa.Integer, nullable=False),
        sa.Column("completion_tokens", sa.Double, nullable=True),
        sa.Column("seconds", sa.Double, nullable=True),
        sa.UniqueConstraint("expert", "identity", "source", "skill", name="uq_profiles"),
    )
    state = sa.table("registry_state", sa.column("schema", sa.Integer))
    op.execute(state.update().values(schema=2))
