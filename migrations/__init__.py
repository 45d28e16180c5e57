"""Schema migrations: one tree for SQLite and Postgres."""
