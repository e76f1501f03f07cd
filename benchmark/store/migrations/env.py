"""Runs the migrations on the connection that the caller hands over, inside the caller's transaction."""

from alembic import context

from moebench.store.orm import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
