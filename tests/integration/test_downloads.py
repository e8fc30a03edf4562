"""Shards in pieces: a source that breaks off, a restart, and a relay that passes on what is still coming in."""

import asyncio
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from farflung.net.client import Client
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import Unreachable
from farflung.protocol.identity import Signed, seal
from farflung.protocol.messages import Manifest, Shard, Tensor
from farflung.weights.cache import Versions
from farflung.weights.download import Downloads
from farflung.weights.manifest import KIND, manifest_digest, target_digest
from farflung.weights.mirror import Mirror
from farflung.weights.origin import byte_range
from standin import NODE, TRAINER, Source, served, session_with

DATA = bytes(range(256)) * 4000
SHARD = Shard(digest=digest_of(DATA), size_bytes=len(DATA))


def sealed() -> Signed:
    tensors = [Tensor(name="a", dtype="float32", shape=[1], digest="1" * 64, shard=0)]
    manifest = Manifest(
        run="test",
        step=0,
        base_step=0,
        parent="",
        digest=target_digest(tensors),
        tensors=tensors,
        shards=[SHARD],
        secret_commitment="0" * 64,
        made_at=0.0,
        expires_at=2e9,
    )
    return seal(TRAINER, KIND, manifest)


def test_a_download_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    async def scene() -> None:
        origin = Source(sealed(), DATA)
        origin.breaks = [300_000, 200_000]
        async with served(origin.app()) as url, session_with(url, 2.0) as session:
            await Downloads(session, tmp_path, use_relays=False).fetch([SHARD])
        assert (tmp_path / SHARD.digest).read_bytes() == DATA
        starts = [int(asked.removeprefix("bytes=").removesuffix("-") or 0) for asked in origin.ranges]
        assert starts == [0, 300_000, 500_000]

    asyncio.run(scene())


def test_a_restart_goes_on_from_what_is_on_disk(tmp_path: Path) -> None:
    async def scene() -> None:
        origin = Source(sealed(), DATA)
        (tmp_path / f"{SHARD.digest}.part").write_bytes(DATA[:700_000])
        async with served(origin.app()) as url, session_with(url, 2.0) as session:
            await Downloads(session, tmp_path, use_relays=False).fetch([SHARD])
        assert origin.ranges == ["bytes=700000-"]
        assert [path.name for path in tmp_path.iterdir()] == [SHARD.digest]

    asyncio.run(scene())


@pytest.mark.parametrize("size", [100, len(DATA), len(DATA) + 7], ids=["some", "all", "too much"])
def test_wrong_bytes_on_disk_are_fetched_anew(size: int, tmp_path: Path) -> None:
    async def scene() -> None:
        origin = Source(sealed(), DATA)
        (tmp_path / f"{SHARD.digest}.part").write_bytes(b"\1" * size)
        async with served(origin.app()) as url, session_with(url, 2.0) as session:
            await Downloads(session, tmp_path, use_relays=False).fetch([SHARD])
        assert (tmp_path / SHARD.digest).read_bytes() == DATA
        assert origin.ranges[-1] == ""

    asyncio.run(scene())


def test_what_came_before_nobody_answers_is_kept(tmp_path: Path) -> None:
    async def scene() -> None:
        origin = Source(sealed(), DATA)
        origin.breaks = [1000] * 99
        async with served(origin.app()) as url, session_with(url, 2.0) as session:
            session.client.patience_s = 0.0
            with pytest.raises(Unreachable):
                await Downloads(session, tmp_path, use_relays=False).fetch([SHARD])
        assert (tmp_path / f"{SHARD.digest}.part").read_bytes() == DATA[:1000]

    asyncio.run(scene())


@pytest.mark.parametrize("asked", ["", "bytes=2000-9999"], ids=["whole", "a range"])
def test_a_relay_passes_on_what_is_still_coming_in(asked: str, tmp_path: Path) -> None:
    async def scene() -> None:
        origin = Source(sealed(), DATA)
        origin.gate.clear()
        async with served(origin.app()) as url, session_with(url, 2.0) as session:
            versions = Versions(session, tmp_path, use_relays=False)
            mirror = Mirror(versions)
            relay = Starlette(routes=[Route("/v1/blobs/{digest}", mirror.blob)])
            async with served(relay) as relay_url:
                following = asyncio.create_task(mirror.follow(manifest_digest(sealed())))
                while not versions.partial(SHARD.digest).exists():
                    await asyncio.sleep(0.01)
                client = Client(relay_url, NODE, patience_s=0.0)
                headers = {"range": asked} if asked else {}
                async with client._http.stream("GET", f"/v1/blobs/{SHARD.digest}", headers=headers) as response:
                    parts = response.aiter_bytes()
                    first = await anext(parts)
                    assert not versions.path(SHARD.digest).exists(), "the relay itself waits for the rest"
                    origin.gate.set()
                    body = first + b"".join([part async for part in parts])
                await following
                await client.close()
            await versions.close()
        start, end = byte_range(asked, len(DATA))
        assert (response.status_code, body) == (206 if asked else 200, DATA[start:end])
        assert versions.path(SHARD.digest).exists()

    asyncio.run(scene())
