"""Steps from each format of the registry's database to the next, run by Alembic (`registry.schema`)."""
