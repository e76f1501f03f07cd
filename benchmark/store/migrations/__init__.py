"""Alembic migrations of the results database, run by `moebench.store.migrate`."""
