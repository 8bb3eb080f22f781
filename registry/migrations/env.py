"""What Alembic runs to migrate: on the connection it is given, inside the transaction that is open there."""

from alembic import context

from registry.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
