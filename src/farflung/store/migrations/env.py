"""Runs the migrations against the engine that `db.migrate` hands over."""

from alembic import context

from farflung.store.tables import metadata

with context.config.attributes["engine"].connect() as connection:
    context.configure(connection=connection, target_metadata=metadata)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
