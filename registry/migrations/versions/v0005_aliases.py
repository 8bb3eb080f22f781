"""Format 5: aliases of experts with their moves, and what admin calls state of experts."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add two empty tables; existing tables are unchanged."""
    op.create_table(
        "alias_moves",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("alias", sa.String(128), nullable=False, index=True),
        sa.Column("expert", sa.String(128), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("moved_at", sa.Double, nullable=False),
        sa.Column("moved_by", sa.String(128), nullable=False),
        sa.Column("undone_at", sa.Double, nullable=True),
        sa.Column("undone_by", sa.String(128), nullable=True),
    )
    op.create_table(
        "expert_states",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("drained", sa.Text, nullable=True),
        sa.Column("pinned", sa.Boolean, nullable=False),
        sa.Column("changed_at", sa.Double, nullable=False),
        sa.Column("changed_by", sa.String(128), nullable=False),
    )
    state = sa.table("registry_state", sa.column("schema", sa.Integer))
    op.execute(state.update().values(schema=5))
