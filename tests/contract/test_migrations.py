"""The tables in code and the tables that the migrations make are the same ones."""

import contextlib
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from farflung.store.db import migrate
from farflung.store.sql_connections import open_engine
from farflung.store.tables import metadata


@pytest.fixture(params=["sqlite", "postgresql"])
def schemas(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a database has after the migrations, and after `metadata.create_all`."""
    if request.param == "sqlite":
        migrated, created = (f"sqlite:///{tmp_path / name}.db" for name in ("migrated", "created"))
    else:
        migrated, created = (request.getfixturevalue("new_postgres")() for _ in range(2))
    migrate(migrated)
    migrate(migrated)
    engine = open_engine(created)
    metadata.create_all(engine)
    engine.dispose()
    return schema(migrated), schema(created)


def schema(url: str) -> dict[str, Any]:
    """Every table with its columns, keys, checks and indices, in a form that can be compared."""
    engine = open_engine(url)
    found = sa.inspect(engine)
    tables = {name: table(found, name) for name in found.get_table_names() if name != "alembic_version"}
    engine.dispose()
    return tables


def table(found: sa.Inspector, name: str) -> dict[str, Any]:
    """One table as the database describes it."""
    return {
        "columns": {c["name"]: (str(c["type"]), c["nullable"], c["default"]) for c in found.get_columns(name)},
        "key": found.get_pk_constraint(name)["constrained_columns"],
        "foreign": sorted(
            (f["constrained_columns"], f["referred_table"], f["referred_columns"]) for f in found.get_foreign_keys(name)
        ),
        "checks": {c["name"]: " ".join(c["sqltext"].split()) for c in found.get_check_constraints(name)},
        "indices": {i["name"]: (i["column_names"], bool(i["unique"]), where(i)) for i in found.get_indexes(name)},
    }


def where(index: Any) -> str:
    """The condition of a partial index."""
    options = index.get("dialect_options", {})
    return str(options.get("sqlite_where", options.get("postgresql_where")))


def test_migrations_make_the_tables_of_the_code(schemas: tuple[dict[str, Any], dict[str, Any]]) -> None:
    migrated, created = schemas
    assert migrated.keys() == created.keys() == metadata.tables.keys()
    for name, said in created.items():
        assert migrated[name] == said, f"table {name} differs; edit tables.py and the migration together"


def test_downgrade_leaves_nothing(database_url: str) -> None:
    from alembic import command
    from alembic.config import Config

    from farflung.store.db import MIGRATIONS

    migrate(database_url)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["engine"] = engine = open_engine(database_url)
    command.downgrade(config, "base")
    left = sa.inspect(engine).get_table_names()
    engine.dispose()
    assert left == ["alembic_version"]


def test_replicas_that_start_together_migrate_in_turn(database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(migrate, [database_url] * 4))
    assert schema(database_url).keys() == metadata.tables.keys()


def test_a_new_file_that_another_is_writing_to_is_waited_for(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "test.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(migrate, url := f"sqlite:///{tmp_path}/test.db")
            with pytest.raises(TimeoutError):
                done.result(timeout=0.5)
            other.execute("COMMIT")
            done.result(timeout=30)
    assert schema(url).keys() == metadata.tables.keys()
