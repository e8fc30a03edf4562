"""Relays that lie, stall or die: every node still ends with the right bytes, and nothing wrong is ever kept."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backports import zstd
from safetensors.torch import save
from starlette.applications import Starlette
from starlette.routing import Route

from farflung.learner import disk_full
from farflung.net.client import Client
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import BadSignature, Busy, FarflungError, Malformed, WeightsError
from farflung.protocol.identity import Key, Signed, seal
from farflung.protocol.messages import Manifest, Shard
from farflung.weights import cache, download, ranges
from farflung.weights.cache import Versions
from farflung.weights.manifest import KIND, manifest_digest, target_digest
from farflung.weights.mirror import Mirror
from farflung.weights.publish import describe
from farflung.weights.tensors import tensors
from small_disk import small_disk
from standin import TRAINER, Source, descriptor, served, session_with

EMPTY_FRAME = zstd.compress(b"")
STRANGER = Key(b"x" * 32)
WEIGHTS = {"a": torch.arange(60_000, dtype=torch.bfloat16), "b": torch.ones(7, 5, dtype=torch.bfloat16)}
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def version(
    step: int = 3, key: Key = TRAINER, run: str = "test", weights: dict[str, torch.Tensor] = WEIGHTS
) -> tuple[Signed, bytes]:
    """A sealed manifest with one shard, and the shard."""
    shard = save(weights)
    described = [describe(name, tensor, 0) for name, tensor in weights.items()]
    manifest = Manifest(
        run=run,
        step=step,
        base_step=step,
        parent="",
        digest=target_digest(described),
        tensors=described,
        shards=[Shard(digest=digest_of(shard), size_bytes=len(shard))],
        secret_commitment="0" * 64,
        made_at=0.0,
        expires_at=2e9,
    )
    return seal(key, KIND, manifest), shard


@asynccontextmanager
async def versions_of(url: str, folder: Path, **options: Any) -> AsyncIterator[Versions]:
    async with session_with(url) as session:
        versions = Versions(session, folder, **options)
        try:
            yield versions
        finally:
            await versions.close()


# --- relays that are not what they should be -------------------------------------------------------------------------


def answering(make: Callable[[bytes], tuple[int, bytes]]) -> Callable[[bytes], Handler]:
    """A server that says what `make` makes of the shard: (declared length, body)."""

    def with_shard(shard: bytes) -> Handler:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            length, body = make(shard)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + body)
            await writer.drain()
            writer.close()

        return handle

    return with_shard


def flipped(shard: bytes) -> tuple[int, bytes]:
    return len(shard), shard[:-1] + bytes([shard[-1] ^ 1])


def endless(shard: bytes) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            while True:
                writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                await writer.drain()
        except ConnectionError:
            writer.close()

    return handle


def dripping(shard: bytes) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(shard))
        try:
            for at in range(200):
                writer.write(shard[at : at + 1])
                await writer.drain()
                await asyncio.sleep(0.05)
        except ConnectionError:
            pass
        finally:
            writer.close()

    return handle


def dying(shard: bytes) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(shard) + shard[:1000])
        await writer.drain()
        writer.close()

    return handle


def packing(shard: bytes) -> Handler:
    """A quarter of a megabyte of empty zstd frames, which a client that unpacks sits over for half a second."""
    body = EMPTY_FRAME * (262_144 // len(EMPTY_FRAME))

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: zstd\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    return handle


HOSTILE = {
    "sends packed nothings": packing,
    "flips a bit": answering(flipped),
    "truncates": answering(lambda shard: (len(shard) // 2, shard[: len(shard) // 2])),
    "sends an older shard": answering(lambda shard: (5, b"older")),
    "never ends": endless,
    "drips": dripping,
    "dies in the middle": dying,
}


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RELAY_S", 0.5)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_relay_costs_one_shard_and_its_own_reputation(name: str, tmp_path: Path) -> None:
    async def scene() -> None:
        signed, shard = version()
        async with AsyncExitStack() as stack:
            origin = Source(signed, shard)
            origin_url = await stack.enter_async_context(served(origin.app()))
            relay = await asyncio.start_server(HOSTILE[name](shard), "127.0.0.1", 0)
            await stack.enter_async_context(relay)
            url = f"http://127.0.0.1:{relay.sockets[0].getsockname()[1]}"
            origin.relays = [url]
            versions = await stack.enter_async_context(versions_of(origin_url, tmp_path))
            since = time.monotonic()
            manifest = await versions.fetch(manifest_digest(signed))
            assert time.monotonic() - since < 10
            assert len(origin.sent) == 1
            assert versions._downloads.scores[url].success < 1
            assert versions.session.stats.last_error.startswith(f"relay {url}: "), "the page says what happened"
            loaded = dict(tensors(versions, manifest_digest(signed)))
            assert all(torch.equal(loaded[key], WEIGHTS[key]) for key in WEIGHTS)
            assert {path.name for path in tmp_path.iterdir()} == {manifest.shards[0].digest}
            relay.close()

    asyncio.run(scene())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_relay_among_honest_ones_is_found_out(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """The shard comes in pieces from all of them at once."""
    monkeypatch.setattr(ranges, "RANGE_BYTES", 10_000)
    monkeypatch.setattr(ranges, "OVERDUE_S", 0.3)

    async def scene() -> None:
        signed, shard = version()
        async with AsyncExitStack() as stack:
            origin, honest = Source(signed, shard), Source(signed, shard)
            origin_url = await stack.enter_async_context(served(origin.app()))
            relay = await asyncio.start_server(HOSTILE[name](shard), "127.0.0.1", 0)
            await stack.enter_async_context(relay)
            url = f"http://127.0.0.1:{relay.sockets[0].getsockname()[1]}"
            origin.relays = [url, await stack.enter_async_context(served(honest.app()))]
            versions = await stack.enter_async_context(versions_of(origin_url, tmp_path))
            await versions.fetch(manifest_digest(signed))
            assert dict(tensors(versions, manifest_digest(signed))).keys() == WEIGHTS.keys()
            scores = versions._downloads.scores
            assert scores[url].success < scores[origin.relays[1]].success == 1
            assert url in versions.session.stats.last_error
            assert len(honest.sent) > 5
            assert [path.name for path in tmp_path.iterdir()] == [digest_of(shard)]
            relay.close()

    asyncio.run(scene())


def test_packed_nothings_hold_nobodys_loop(tmp_path: Path) -> None:
    """Whoever fetches goes on with everything else meanwhile: heartbeats, and as a relay other nodes' shards."""

    async def scene() -> None:
        relay = await asyncio.start_server(packing(b""), "127.0.0.1", 0)
        client = Client(f"http://127.0.0.1:{relay.sockets[0].getsockname()[1]}", STRANGER, patience_s=0.0)
        longest, stop = 0.0, asyncio.Event()

        async def tick() -> None:
            nonlocal longest
            while not stop.is_set():
                since = time.perf_counter()
                await asyncio.sleep(0)
                longest = max(longest, time.perf_counter() - since)

        ticking = asyncio.create_task(tick())
        for ask in (client.download("/"), client.download_range("/", 0, 9), client.get("/", Manifest)):
            with pytest.raises(Malformed, match="packed as 'zstd'"):
                await ask
        stop.set()
        await ticking
        await client.close()
        relay.close()
        assert longest < 0.25

    asyncio.run(scene())


def test_a_piece_that_lies_is_traced_to_its_relay(tmp_path: Path, monkeypatch: Any) -> None:
    """Ranges are answered as asked for, with one wrong byte: only the whole shard shows it."""
    monkeypatch.setattr(ranges, "RANGE_BYTES", 10_000)
    monkeypatch.setattr(download, "RELAY_S", 60.0)  # a busy machine is no matter of this test

    async def scene() -> None:
        signed, shard = version()
        async with AsyncExitStack() as stack:
            origin, honest, liar = (Source(signed, shard) for _ in range(3))
            liar.blobs = {digest: bytes(len(data)) for digest, data in liar.blobs.items()}
            origin_url, good, bad = [
                await stack.enter_async_context(served(one.app())) for one in (origin, honest, liar)
            ]
            origin.relays = [good, bad]
            versions = await stack.enter_async_context(versions_of(origin_url, tmp_path))
            await versions.fetch(manifest_digest(signed))
            scores = versions._downloads.scores
            assert (scores[good].lies, scores[bad].lies >= 1) == (0, True)
            assert dict(tensors(versions, manifest_digest(signed))).keys() == WEIGHTS.keys()

    asyncio.run(scene())


def test_a_relay_may_mirror_another(tmp_path: Path) -> None:
    """Three in a row: the origin is asked once, and the last node gets it through all of them."""

    async def scene() -> None:
        signed, shard = version()
        digest, origin = manifest_digest(signed), Source(signed, shard)
        async with AsyncExitStack() as stack:
            origin_url = await stack.enter_async_context(served(origin.app()))
            upstream: tuple[str, ...] = ()
            for number in range(3):
                options = {"use_relays": False, "upstream": upstream}
                own = await stack.enter_async_context(versions_of(origin_url, tmp_path / f"relay-{number}", **options))
                mirror = Mirror(own)
                await mirror.follow(digest)
                app = Starlette(routes=[Route("/v1/blobs/{digest}", mirror.blob)])
                upstream = (await stack.enter_async_context(served(app)),)
            node = await stack.enter_async_context(versions_of(origin_url, tmp_path / "node", upstream=upstream))
            await node.fetch(digest)
            assert len(origin.sent) == 1
            assert dict(tensors(node, digest)).keys() == WEIGHTS.keys()

    asyncio.run(scene())


def test_a_relay_sends_one_address_no_more_than_its_share(tmp_path: Path) -> None:
    async def scene() -> None:
        signed, shard = version()
        origin, url = Source(signed, shard), f"/v1/blobs/{digest_of(shard)}"
        origin.gate.clear()
        async with AsyncExitStack() as stack:
            origin_url = await stack.enter_async_context(served(origin.app()))
            own = await stack.enter_async_context(versions_of(origin_url, tmp_path, use_relays=False))
            mirror = Mirror(own, per_client=2)
            following = asyncio.create_task(mirror.follow(manifest_digest(signed)))
            app = Starlette(routes=[Route("/v1/blobs/{digest}", mirror.blob)])
            relay = Client(await stack.enter_async_context(served(app)), STRANGER, patience_s=0.0)
            greedy = [asyncio.create_task(relay.download(url)) for _ in range(2)]
            while mirror._sending.total() < 2:
                await asyncio.sleep(0.01)
            with pytest.raises(Busy, match="ask another source"):
                await relay.download(url)
            origin.gate.set()
            assert await asyncio.gather(*greedy) == [shard, shard]
            await following
            assert await relay.download(url) == shard, "places are free again"
            await relay.close()

    asyncio.run(scene())


def test_an_honest_relay_spares_the_origin(tmp_path: Path) -> None:
    async def scene() -> None:
        signed, shard = version()
        digest = manifest_digest(signed)
        async with AsyncExitStack() as stack:
            origin = Source(signed, shard)
            origin_url = await stack.enter_async_context(served(origin.app()))
            own = await stack.enter_async_context(versions_of(origin_url, tmp_path / "relay", use_relays=False))
            mirror = Mirror(own)
            await mirror.follow(digest)
            app = Starlette(routes=[Route("/v1/blobs/{digest}", mirror.blob)])
            origin.relays = [await stack.enter_async_context(served(app))]
            for number in range(3):
                async with versions_of(origin_url, tmp_path / str(number)) as versions:
                    await versions.fetch(digest)
            assert len(origin.sent) == 1, "the relay's own copy and no other"
            relay = Client(origin.relays[0], STRANGER, patience_s=0.0)
            part = await relay._http.get(f"/v1/blobs/{digest_of(shard)}", headers={"range": "bytes=5-9"})
            assert (part.status_code, part.content) == (206, shard[5:10])
            with pytest.raises(FarflungError, match="no version"):
                await relay.download(f"/v1/blobs/{'0' * 64}")
            await relay.close()

    asyncio.run(scene())


# --- manifests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "sent", "error"),
    [
        (version(key=STRANGER)[0], version(key=STRANGER)[0], BadSignature),
        (version(run="other")[0], version(run="other")[0], WeightsError),
        (version(step=3)[0], version(step=2)[0], WeightsError),
    ],
    ids=["signed by a stranger", "of another run", "an older one instead"],
)
def test_a_wrong_manifest_is_refused(asked: Signed, sent: Signed, error: type[Exception], tmp_path: Path) -> None:
    async def scene() -> None:
        origin = Source()
        origin.manifests[manifest_digest(asked)] = sent
        async with served(origin.app()) as origin_url, versions_of(origin_url, tmp_path) as versions:
            with pytest.raises(error):
                await versions.fetch(manifest_digest(asked))
        assert list(tmp_path.iterdir()) == []

    asyncio.run(scene())


def test_a_rotated_key_is_accepted_by_the_roots_word(tmp_path: Path) -> None:
    """In the middle of a stay: the manifest is by a key that the node has never met."""

    async def scene() -> None:
        signed, shard = version(key=STRANGER)
        origin = Source(signed, shard)
        async with served(origin.app()) as url, versions_of(url, tmp_path) as versions:
            with pytest.raises(BadSignature):
                await versions.fetch(manifest_digest(signed))
            origin.descriptor = descriptor(TRAINER.public, STRANGER.public)
            await versions.fetch(manifest_digest(signed))
            assert dict(tensors(versions, manifest_digest(signed))).keys() == WEIGHTS.keys()

    asyncio.run(scene())


def test_a_version_beyond_the_disk_limit_is_refused_before_a_byte(tmp_path: Path) -> None:
    async def scene() -> None:
        signed, shard = version()
        origin = Source(signed, shard)
        async with served(origin.app()) as origin_url, versions_of(origin_url, tmp_path, limit_bytes=1000) as versions:
            with pytest.raises(WeightsError, match="this node allows 1,000"):
                await versions.fetch(manifest_digest(signed))
            assert not origin.sent

    asyncio.run(scene())


def test_a_disk_that_fills_up_on_the_way_is_said_so_and_blames_nobody(tmp_path: Path, monkeypatch: Any) -> None:
    """A real file system of 64 kB, which is larger the second time."""
    monkeypatch.setattr(cache, "SPARE_BYTES", -(1 << 30))  # as if it was filled after the look at what is free
    small = tmp_path / "disk"

    async def scene(resize: Callable[[int], None]) -> None:
        signed, shard = version()
        async with AsyncExitStack() as stack:
            origin, honest = Source(signed, shard), Source(signed, shard)
            origin_url, url = [await stack.enter_async_context(served(one.app())) for one in (origin, honest)]
            origin.relays = [url]
            versions = await stack.enter_async_context(versions_of(origin_url, small))
            with pytest.raises(WeightsError, match="No space left"):
                await versions.fetch(manifest_digest(signed))
            assert "No space left" in versions.session.stats.last_error
            assert url not in versions._downloads.scores
            assert not list(small.iterdir())
            resize(1 << 20)
            await versions.fetch(manifest_digest(signed))
            assert dict(tensors(versions, manifest_digest(signed))).keys() == WEIGHTS.keys()

    with small_disk(small, 64 << 10) as resize:
        asyncio.run(scene(resize))


def test_an_older_version_makes_room_for_a_newer_one(tmp_path: Path) -> None:
    async def scene() -> None:
        signed, shard = version()
        newer = {"a": WEIGHTS["a"] + 1}
        later, more = version(step=4, weights=newer)
        origin = Source(signed, shard)
        origin.manifests[manifest_digest(later)] = later
        origin.blobs[digest_of(more)] = more
        limit = int(1.5 * len(shard))
        async with served(origin.app()) as url, versions_of(url, tmp_path, limit_bytes=limit, patch=None) as versions:
            await versions.fetch(manifest_digest(signed))
            await versions.fetch(manifest_digest(later))
            assert not versions.has(manifest_digest(signed))
            assert [path.name for path in tmp_path.iterdir()] == [digest_of(more)]

    asyncio.run(scene())


def test_a_full_disk_is_said_so_and_a_trainer_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimpleNamespace(free=cache.SPARE_BYTES + 10)
    said: list[str] = []

    def hear(error: str) -> None:
        said.append(error)
        disk.free += 1 << 30

    async def scene() -> None:
        signed, shard = version()
        digest = manifest_digest(signed)
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: disk)
        origin = Source(signed, shard)
        async with served(origin.app()) as origin_url, versions_of(origin_url, tmp_path) as versions:
            with pytest.raises(WeightsError, match="bytes more disk"):
                await versions.fetch(digest)
            await disk_full.retry_when_disk_full("weights", lambda: versions.fetch(digest), hear, lambda: False)
            assert versions.has(digest)

    asyncio.run(scene())
    assert "bytes more disk" in said[0]
    assert said[1:] == [""]


def test_a_shard_damaged_on_disk_is_refused_when_loaded(tmp_path: Path) -> None:
    async def scene() -> None:
        signed, shard = version()
        origin = Source(signed, shard)
        async with served(origin.app()) as origin_url, versions_of(origin_url, tmp_path) as versions:
            manifest = await versions.fetch(manifest_digest(signed))
            path = versions.path(manifest.shards[0].digest)
            path.write_bytes(flipped(path.read_bytes())[1])
            with pytest.raises(WeightsError, match="hashes to"):
                dict(tensors(versions, manifest_digest(signed)))

    asyncio.run(scene())
