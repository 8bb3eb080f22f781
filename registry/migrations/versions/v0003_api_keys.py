"""Format 3: API keys of the service."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add an empty table; existing tables are unchanged."""
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(12), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("revoked_at", sa.Double, nullable=True),
        sa.Column("change", sa.Integer, nullable=False, index=True),
    )
    state = sa.table("registry_state", sa.column("schema", sa.Integer))
    op.execute(state.update().values(schema=3))
