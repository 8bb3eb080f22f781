"""Format 6: the highest priority of the requests of an API key."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add a column; requests of existing keys have at most normal priority."""
    op.add_column("api_keys", sa.Column("priority", sa.String(8), nullable=False, server_default="normal"))
    state = sa.table("registry_state", sa.column("schema", sa.Integer))
    op.execute(state.update().values(schema=6))
