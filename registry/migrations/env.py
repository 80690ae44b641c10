"""Alembic's entry point: migrates over the connection that `registry.database` hands in, inside its transaction."""

from __future__ import annotations

from alembic import context

from registry.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite cannot alter most columns in place
)
with context.begin_transaction():
    context.run_migrations()
