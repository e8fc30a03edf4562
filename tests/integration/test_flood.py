"""Floods: bodies, connections, streams, leases that nobody works on, and a metrics file that grows."""

import asyncio
import threading
import time
from collections import Counter

import numpy as np
import pytest
import sqlalchemy as sa
import uvicorn

from farflung.coordinator import connections
from farflung.dashboard.live import Viewers
from farflung.net import bodies
from farflung.net.server import listen
from farflung.protocol import errors, wire
from farflung.protocol import messages as m
from farflung.protocol.identity import Signed
from farflung.queries.cost import Meter
from farflung.queries.shared import Shared
from farflung.store import metrics
from farflung.store.db import MOST_PAGE_READS
from farflung.store.metrics import Metrics
from farflung.store.tables import EVENTS, LEASES, NODES, ROLLOUTS

# --- bodies ------------------------------------------------------------------------------------------------------


async def kept(house) -> int:
    return len([digest async for digest, _ in house.ctx.archive.blobs.stored()])


def variant(lease: m.Lease, number: int) -> m.Submission:
    rng = np.random.default_rng(number)
    ids = [wire.pack_ids(rng.integers(3, 32, lease.max_new_tokens)) for group in lease.groups for _ in group.samples]
    samples = [sample for group in lease.groups for sample in group.samples]
    return m.Submission(
        rollouts=[m.SubmittedRollout(rollout=s.rollout, ids=i) for s, i in zip(samples, ids, strict=True)]
    )


def test_of_many_bodies_for_one_lease_one_is_stored(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        lease = await house.lease("eve")

        async def one(number: int) -> str:
            try:
                await house.tell("eve", f"leases/{lease.lease}/submission", variant(lease, number), Signed)
            except errors.Refusal as refusal:
                return refusal.code
            return "ok"

        told = Counter(await asyncio.gather(*(one(number) for number in range(200))))
        assert told["ok"] == 1
        assert set(told) <= {"ok", "busy", "lease-gone"}
        assert await kept(house) == 1

    house.run(scenario)


def test_the_body_of_a_refused_submission_is_gone_at_once(house) -> None:
    async def scenario(house) -> None:
        await house.commit(await house.claim_step(0), probe=b"probe")
        lease = await house.lease("eve")
        with pytest.raises(errors.WrongWeights):
            await house.submit("eve", lease)
        assert await kept(house) == 0

    house.run(scenario)


def test_bodies_on_their_way_are_bounded_together_and_one_at_a_time_from_each(monkeypatch) -> None:
    monkeypatch.setattr(bodies, "PATIENCE_S", 0.05)

    async def scenario() -> None:
        room = bodies.Bodies(100, lambda sender: sender == "trainer")
        async with room.receiving("ada") as ada, room.receiving("bob") as bob, room.receiving("trainer") as trainer:
            ada(60)
            bob(40)
            trainer(10_000)
            with pytest.raises(errors.Unavailable, match="try again") as told:
                bob(1)
            assert told.value.retry_after_s == 2
            with pytest.raises(errors.Busy, match="one at a time"):
                async with room.receiving("ada"):
                    pass
        async with room.receiving("ada") as ada:
            ada(1000)  # alone it may be larger, or it could never come
        assert not room._lines
        assert not room._total

    asyncio.run(scenario())


# --- connections -------------------------------------------------------------------------------------------------


async def served(house, most: int, scenario) -> None:
    """A coordinator behind a real socket, guarded as `serve` guards it."""
    options = uvicorn.Config(house.coordinator.app(), log_level="error", http=connections.guarded(most))
    options.timeout_graceful_shutdown = 1
    server = uvicorn.Server(options)
    listener = listen("127.0.0.1", 0)
    listener.listen(512)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        await scenario(server, listener.getsockname()[1])
    finally:
        server.should_exit = True
        await task


async def opened(port: int, head: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head)
    return reader, writer


async def dripped(writer: asyncio.StreamWriter) -> None:
    """A head that never ends, one line a while."""
    while not writer.is_closing():
        writer.write(b"x: y\r\n")
        await asyncio.sleep(0.1)


def test_idle_and_half_headed_connections_are_hung_up_on(house, monkeypatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 1.0)

    async def scenario(server, port: int) -> None:
        since = time.monotonic()
        heads = [b"", b"GET /v1 HTTP/1.1\r\nhost: x\r\n", b"GET /v1 HTTP/1.1\r\nhost: x\r\n\r\n" + b"GET / HT", b"\r\n"]
        lines = [await opened(port, heads[number % len(heads)]) for number in range(60)]
        dripping = asyncio.create_task(dripped(lines[1][1]))
        while server.server_state.connections and time.monotonic() - since < 15:
            await asyncio.sleep(0.1)
        assert time.monotonic() - since < 15
        dripping.cancel()
        reader, writer = await opened(port, b"GET /v1 HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        for _, line in lines:
            line.close()

    asyncio.run(served(house, 0, scenario))


def test_an_address_has_so_many_connections(house) -> None:
    async def scenario(_, port: int) -> None:
        lines = [await opened(port, b"GET /v1 HTTP/1.1\r\nhost: x\r\n") for _ in range(20)]
        reader, writer = await opened(port, b"")
        assert b"429" in await reader.readline()
        for _, line in lines[:10]:
            line.close()
        writer.close()
        await asyncio.sleep(0.2)
        reader, writer = await opened(port, b"GET /v1 HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        for line in (writer, *(line for _, line in lines[10:])):
            line.close()

    asyncio.run(served(house, 20, scenario))


# --- streams -----------------------------------------------------------------------------------------------------


def test_one_address_fills_its_own_places_and_many_lock_nobody_out() -> None:
    viewers = Viewers(most=8, of_address=4)
    first = [viewers.enter("10.0.0.1") for _ in range(4)]
    with pytest.raises(errors.Busy, match=r"4 streams go to 10\.0\.0\.1"):
        viewers.enter("10.0.0.1")
    others = [viewers.enter("10.0.0.2") for _ in range(4)]
    honest = viewers.enter("192.0.2.7")
    assert len(viewers) == 8
    assert [place.is_set() for place in first] == [True, False, False, False], "the oldest of the greediest"
    viewers.leave("10.0.0.1", first[0])
    for place in (*first[1:], *others):
        viewers.leave("10.0.0.1" if place in first else "10.0.0.2", place)
    assert len(viewers) == 1
    assert not honest.is_set()


# --- what comes to nothing ---------------------------------------------------------------------------------------


def test_keys_that_take_a_lease_and_hand_it_back_are_slowed_and_forgotten(make_house) -> None:
    house = make_house(trust={"probation_slots": 4, "probation_waiting": 1}, learn={"groups": 16})

    async def scenario(house) -> None:
        await house.step(0)
        await house.make_trusted("ada")
        before = {table.name: len(house.rows(sa.select(table))) for table in (LEASES, ROLLOUTS, NODES, EVENTS)}
        got = 0
        for number in range(40):
            if lease := await house.ask(f"eve-{number}"):
                await house.give_back(f"eve-{number}", lease)
                got += 1
        assert got == 4, "a slot is taken for a while after its lease was let go"
        house.clock.now += 31
        assert await house.ask("eve-41") is not None
        await house.swept(after_s=120)
        assert await house.coordinator.sweeper.forget() == 0, "what is recent stays"
        house.clock.now += 4000
        assert await house.coordinator.sweeper.forget() == 5 + 41
        after = {table.name: len(house.rows(sa.select(table))) for table in (LEASES, ROLLOUTS, NODES, EVENTS)}
        assert after["leases"] == before["leases"]
        assert after["rollouts"] == before["rollouts"]
        assert after["nodes"] == before["nodes"]
        assert after["events"] <= before["events"] + 16, "groups were opened, which others fill"

    house.run(scenario)


def test_leases_of_nodes_that_handed_something_in_are_kept(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada")
        lease = await house.lease("ada")
        await house.give_back("ada", lease)
        house.clock.now += 10_000
        assert await house.coordinator.sweeper.forget() == 0
        assert house.row(LEASES, lease.lease).status == "returned"

    house.run(scenario)


# --- metrics.jsonl -----------------------------------------------------------------------------------------------


def beat(at: float) -> m.Heartbeat:
    return m.Heartbeat(cpu_s=at, started_at=1.0)


def test_many_nodes_write_no_more_lines_than_few(tmp_path) -> None:
    notes = Metrics(tmp_path / "metrics.jsonl")
    for second in range(0, 200, 2):
        for node in range(100):
            notes.note_node(f"n{node}", "worker", 1.0, beat(second), second)
        notes.flush(second)
    lines = list(notes.lines())
    assert len(lines) <= 100 * metrics.NODES_AT_ONCE
    assert len({line["node"] for line in lines}) == 100, "everybody's turn comes"
    notes.flush(300.0, force=True)
    assert len(list(notes.lines())) == len(lines) + 92


def test_a_large_file_is_thinned_and_says_the_same(tmp_path, make_house, monkeypatch) -> None:
    house, path = make_house(), tmp_path / "metrics.jsonl"
    notes, meter = Metrics(path), Meter(path, house.config)
    notes.write("start", 1.0)
    for second in range(0, 8000, 20):
        notes.note_node("n1", "worker", 1.0, beat(second), second)
        notes.flush(second)
    notes.write("eval", 8000.0, step=3)
    told, before = meter.read(), path.stat().st_size
    assert not notes.thin()
    monkeypatch.setattr(metrics, "MOST_BYTES", 1000)
    assert notes.thin()
    assert path.stat().st_size < before / 20
    assert [line["kind"] for line in notes.lines()] == ["start", "node", "node", "node", "eval"]
    assert meter.read() == told
    notes.write("end", 8001.0)
    assert meter.read()[2] == 8000.0


def test_an_evaluation_is_noted_once_and_the_file_is_not_read_again(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    notes, other = Metrics(path), Metrics(path)
    view = m.EvalView(step=3, score=0.5, tasks=4, low=0.4, high=0.6)
    notes.note_evals([view], 1.0)
    notes.note_evals([view], 1.5)
    other.note_evals([view], 2.0)
    size = path.stat().st_size
    path.write_bytes(b"x" * size)  # in place: whoever read it again would not find the line
    notes.note_evals([view], 3.0)
    assert path.stat().st_size == size


# --- readers -----------------------------------------------------------------------------------------------------


def test_no_node_and_no_sweep_waits_for_those_who_look_on(house) -> None:
    """Reads of pages that never end take the threads of pages alone, and no more than so many may wait."""
    gone = threading.Event()

    async def scenario(house) -> None:
        database, line = house.ctx.database, house.line("nobody")
        await house.commit(await house.claim_step(0))
        looks = [asyncio.create_task(database.read_page(lambda c: gone.wait(20))) for _ in range(MOST_PAGE_READS)]
        await asyncio.sleep(0.05)
        try:
            async with asyncio.timeout(10):
                latest = await line.get(f"{house.path}/latest", m.Latest)
                await line.get(f"{house.path}/manifests/{latest.manifest}", Signed)
                await house.work("ada")
                await house.audit()
                await house.coordinator.sweeper.note_evals()
                await house.swept()
            for path in (f"{house.path}/status", "/metrics", "/v1/story/x", f"{house.path}/weights"):
                with pytest.raises(errors.Unavailable, match="too many look on"):
                    await line.get(path, m.Status)
            assert (await line._http.get("/ledger")).status_code == 503
        finally:
            gone.set()
            await asyncio.gather(*looks)
        assert (await line.get(f"{house.path}/status", m.Status)).latest.step == 0
        await line.close()

    house.run(scenario)


def test_readers_share_one_look_and_a_slow_one_is_kept() -> None:
    async def scenario() -> None:
        now, looks = [0.0], []

        async def look() -> int:
            looks.append(None)
            await asyncio.sleep(0.01)
            now[0] += took_s
            return len(looks)

        shared, took_s = Shared(look, lambda: now[0]), 1.0
        assert await asyncio.gather(*(shared.get() for _ in range(50))) == [1] * 50
        now[0] += 3.9
        assert await shared.get() == 1
        now[0] += 0.2
        took_s = 0.01
        assert await shared.get() == 2
        assert await shared.get() == 3, "a quick look is taken anew each time"

    asyncio.run(scenario())


def test_one_reader_that_leaves_takes_the_look_from_nobody() -> None:
    async def scenario() -> None:
        async def look() -> str:
            await asyncio.sleep(0.05)
            return "seen"

        shared = Shared(look)
        first, second = asyncio.create_task(shared.get()), asyncio.create_task(shared.get())
        await asyncio.sleep(0.01)
        first.cancel()
        assert await second == "seen"

    asyncio.run(scenario())
