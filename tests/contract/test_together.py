"""Requests that are served as a set: each gets what it would get alone, and a bad one harms no other."""

import asyncio
import time
from dataclasses import replace

import pytest
import sqlalchemy as sa

from farflung.coordinator.node_routes import take
from farflung.protocol import messages as m
from farflung.protocol.errors import Ejected, Forbidden, LeaseGone, NotFound
from farflung.protocol.identity import Signed, unseal
from farflung.rollouts import intake
from farflung.rollouts.validate import inspect
from farflung.store.bulk import SIZES, insert_rows, update_rows
from farflung.store.db import Database, migrate
from farflung.store.tables import EVENTS, LEASES, NODES, ROLLOUTS
from farflung.store.transitions import record, story

WORKERS = [f"worker-{number}" for number in range(12)]
ROOMY = {"trust": {"probation_slots": 99, "probation_waiting": 99}, "lease": {"ahead": 99.0, "rollouts": 3}}


@pytest.fixture
def database(database_url: str):
    migrate(database_url)
    found = Database(database_url)
    yield found
    found.close()


async def as_a_set(database: Database, *requests):
    """Keep the writer busy until all of these wait for it."""
    busy = asyncio.ensure_future(database.write(lambda c: time.sleep(0.3)))
    await asyncio.sleep(0.05)
    answers = await asyncio.gather(*requests, return_exceptions=True)
    await busy
    return answers


def test_a_set_that_fails_is_served_one_by_one(database) -> None:
    sets: list[list[str]] = []

    def serve(connection: sa.Connection, items):
        sets.append(list(items))
        record(connection, "node", items, "", "seen", 0.0)
        if "bad" in items:
            raise Forbidden("not this one")
        return [item.upper() for item in items]

    answers = asyncio.run(as_a_set(database, *(database.write_together(serve, item) for item in ("a", "bad", "b"))))
    assert (answers[0], answers[2]) == ("A", "B")
    assert isinstance(answers[1], Forbidden)
    assert sets == [["a", "bad", "b"], ["a"], ["bad"], ["b"]]
    seen = asyncio.run(database.read(lambda c: [len(story(c, item)) for item in ("a", "bad", "b")]))
    assert seen == [1, 0, 1]


def test_an_answer_that_is_an_error_is_raised_and_its_changes_stay(database) -> None:
    def serve(connection: sa.Connection, items):
        record(connection, "node", items, "", "seen", 0.0)
        return [Forbidden("no") if item == "bad" else item for item in items]

    answers = asyncio.run(as_a_set(database, *(database.write_together(serve, item) for item in ("a", "bad"))))
    assert answers[0] == "a"
    assert isinstance(answers[1], Forbidden)
    assert asyncio.run(database.read(lambda c: len(story(c, "bad")))) == 1


@pytest.mark.parametrize("count", [1, SIZES[0] + SIZES[1] + 3])
def test_rows_in_one_statement_are_the_rows_one_by_one(database, count) -> None:
    common = {"public": b"\0k", "name": "", "role": "worker", "status": "probation", "engine": "", "profile": ""}
    rows = [
        common | {"node": f"n{i}", "hardware": "", "record": b"", "registered_at": 0.5, "seen_at": i / 2}
        for i in range(count)
    ]

    def change(connection: sa.Connection) -> None:
        insert_rows(connection, NODES, rows)
        update_rows(
            connection,
            NODES,
            [{"node": f"n{i}", "loaded_step": i, "heartbeat": bytes([i % 256])} for i in range(count)],
        )

    asyncio.run(database.write(change))
    query = sa.select(
        NODES.c.node, NODES.c.seen_at, NODES.c.loaded_step, NODES.c.heartbeat, NODES.c.phase, NODES.c.public
    )
    found = {row[0]: tuple(row[1:]) for row in asyncio.run(database.read(lambda c: c.execute(query).all()))}
    assert found == {f"n{i}": (i / 2, i, bytes([i % 256]), "", b"\0k") for i in range(count)}


def test_many_who_ask_at_once_share_no_sample(make_house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        for name in WORKERS:
            await house.client(name)
        asked = [house.ask(name) for name in (*WORKERS, WORKERS[0])]
        *leases, again = await as_a_set(house.ctx.database, *asked)
        assert again == leases[0]
        owned = [(g.group, s.index) for lease in leases for g in lease.groups for s in g.samples]
        assert len(set(owned)) == len(owned) == 3 * len(WORKERS)
        groups: dict[str, int] = {}
        for group, _ in owned:
            groups[group] = groups.get(group, 0) + 1
        assert sorted(groups.values()) == [4] * 9, "groups are filled up before others are opened"
        receipts = await as_a_set(
            house.ctx.database,
            *(house.submit(name, lease) for name, lease in zip(WORKERS, leases, strict=True)),
        )
        assert [receipt.lease for receipt in receipts] == [lease.lease for lease in leases]

    make_house(**ROOMY).run(scenario)


def test_a_bad_submission_harms_none_that_comes_with_it(make_house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        leases = {name: await house.lease(name) for name in ("ada", "bob", "eve", "joe")}
        await house.give_back("joe", leases["joe"])
        database, run_ctx = house.ctx.database, house.ctx.run_ctx

        def delivery(name: str, whose: str = "") -> intake.StoredSubmission:
            node, lease = house.named(name).id, leases[whose or name]
            valid = inspect(lease, node, house.honest(lease), run_ctx.vocab, run_ctx.eos_ids)
            return intake.StoredSubmission(node, valid, "", None)

        def unleased(given: intake.StoredSubmission) -> intake.StoredSubmission:
            lease = m.Lease(
                **{name: getattr(given.valid.lease, name) for name in m.Lease.__struct_fields__} | {"lease": "lx"}
            )
            return replace(given, valid=replace(given.valid, lease=lease))

        def banned(connection: sa.Connection) -> None:
            connection.execute(NODES.update().where(NODES.c.node == house.named("eve").id).values(status="ejected"))

        await database.write(banned)
        sent = [
            delivery("ada"),
            delivery("eve", "ada"),
            delivery("bob"),
            replace(delivery("bob"), node="nobody"),
            delivery("ada"),
            delivery("joe"),
            unleased(delivery("ada")),
            delivery("eve"),
        ]
        answers = await as_a_set(database, *(house.ctx.write_together(take, one) for one in sent))
        kinds = [Signed, Forbidden, Signed, NotFound, Signed, LeaseGone, NotFound, Ejected]
        assert [type(answer) for answer in answers] == kinds
        assert answers[0] == answers[4], "sent twice, counted once"
        assert unseal(answers[2], "receipt", m.Receipt).lease == leases["bob"].lease
        statuses = {row.lease: row.status for row in house.rows(sa.select(LEASES.c.lease, LEASES.c.status))}
        assert [statuses[leases[name].lease] for name in ("ada", "bob", "eve", "joe")] == [
            "submitted",
            "submitted",
            "open",
            "returned",
        ]
        taken = sa.select(sa.func.count()).select_from(ROLLOUTS).where(ROLLOUTS.c.submission.is_not(None))
        assert house.rows(taken)[0][0] == 6
        told = sa.select(EVENTS.c.subject).where(EVENTS.c.noun == "lease", EVENTS.c.after == "submitted")
        assert sorted(row[0] for row in house.rows(told)) == sorted(leases[name].lease for name in ("ada", "bob"))
        await database.write(
            lambda c: c.execute(NODES.update().where(NODES.c.status == "ejected").values(status="probation")) and None
        )

    make_house(**ROOMY).run(scenario)
