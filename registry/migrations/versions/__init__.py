"""One step a file: `v0002_...` makes a database of format 2 out of one of format 1. Both SQLite and Postgres."""
