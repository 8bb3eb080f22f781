"""One step per file: `v0002_...` upgrades a database from format 1 to format 2, on SQLite and Postgres."""
