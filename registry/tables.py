"""The registry's tables. A change here needs a step in `registry/migrations` and the next number in `SCHEMA`."""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    Boolean,
    Column,
    Double,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
)

SCHEMA: Final = 6
"""The format of a database, stored in `registry_state.schema`; the migration step to it has the same number."""
MAX_TEXT: Final = 256
"""The most characters of a skill or source, which an index of any database accepts."""

metadata = MetaData()
state = Table(
    "registry_state",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("schema", Integer, nullable=False),
    Column("version", Integer, nullable=False),
)
experts = Table(
    "experts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(128), nullable=False, index=True),
    Column("version", Integer, nullable=False),
    Column("current", Boolean, nullable=False, index=True),
    Column("spec", Text, nullable=False),
    UniqueConstraint("name", "version"),
)
profiles = Table(
    "profiles",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("expert", String(128), nullable=False),
    Column("identity", String(MAX_TEXT), nullable=False),
    Column("source", String(MAX_TEXT), nullable=False),
    Column("skill", String(MAX_TEXT), nullable=False),
    Column("digest", String(128), nullable=False),
    Column("score", Double, nullable=False),
    Column("n", Integer, nullable=False),
    Column("completion_tokens", Double, nullable=True),
    Column("seconds", Double, nullable=True),
    UniqueConstraint("expert", "identity", "source", "skill", name="uq_profiles"),
)
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("spec", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("revoked_at", Double, nullable=True),
    Column("change", Integer, nullable=False, index=True),
    Column("priority", String(8), nullable=False, server_default="normal"),
)

key_usage = Table(
    "key_usage",
    metadata,
    Column("key", String(12), nullable=False),
    Column("what", String(8), nullable=False),
    Column("per", String(8), nullable=False),
    Column("begins", Integer, nullable=False),
    Column("used", Double, nullable=False),
    PrimaryKeyConstraint("key", "what", "per", "begins", name="pk_key_usage"),
)
key_reservations = Table(
    "key_reservations",
    metadata,
    Column("id", String(32), nullable=False),
    Column("key", String(12), nullable=False, index=True),
    Column("what", String(8), nullable=False),
    Column("amount", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    PrimaryKeyConstraint("id", "what", name="pk_key_reservations"),
)
alias_moves = Table(
    "alias_moves",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("alias", String(128), nullable=False, index=True),
    Column("expert", String(128), nullable=False),
    Column("version", Integer, nullable=False),
    Column("moved_at", Double, nullable=False),
    Column("moved_by", String(128), nullable=False),
    Column("undone_at", Double, nullable=True),
    Column("undone_by", String(128), nullable=True),
)
expert_states = Table(
    "expert_states",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("drained", Text, nullable=True),
    Column("pinned", Boolean, nullable=False),
    Column("changed_at", Double, nullable=False),
    Column("changed_by", String(128), nullable=False),
)

alembic_version = Table(
    "alembic_version",
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)
"""Alembic's own table with the step of a database; new databases get it without Alembic."""
