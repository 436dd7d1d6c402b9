"""Run by alembic: the steps happen on the connection, and in the transaction, of whoever opens the archive."""

from alembic import context

from node.archive import schema

context.configure(
    connection=context.config.attributes["connection"], target_metadata=schema.metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
