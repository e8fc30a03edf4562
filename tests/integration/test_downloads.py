"""Shards in pieces: a source that breaks off, a restart, and a relay that passes on what is still coming in."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from farflung.protocol import wire
from farflung.protocol.client import Client
from farflung.protocol.errors import Unreachable
from farflung.protocol.identity import Key, Signed, seal
from farflung.protocol.messages import Manifest, Relays, RunInfo, Shard, Tensor
from farflung.protocol.server import listen
from farflung.protocol.session import Session
from farflung.weights.cache import Versions
from farflung.weights.download import Downloads
from farflung.weights.manifest import KIND, manifest_digest, target_digest
from farflung.weights.mirror import Mirror
from farflung.weights.origin import byte_range

TRAINER, NODE = Key(b"t" * 32), Key(b"s" * 32)
DATA = bytes(range(256)) * 4000
SHARD = Shard(digest=hashlib.sha256(DATA).hexdigest(), size_bytes=len(DATA))


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


class Origin:
    """Serves the one shard by range; `breaks` says where each answer ends early, `gate` holds the rest back."""

    def __init__(self) -> None:
        self.breaks: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.ranges: list[str] = []

    async def blob(self, request: Request) -> Response:
        asked = request.headers.get("range", "")
        self.ranges.append(asked)
        start, end = byte_range(asked, len(DATA))
        until = start + self.breaks.pop(0) if self.breaks else end
        headers = {"content-length": str(end - start), "content-range": f"bytes {start}-{end - 1}/{len(DATA)}"}
        return StreamingResponse(self.body(start, until, until < end), 206 if asked else 200, headers)

    async def body(self, start: int, until: int, breaks: bool) -> AsyncIterator[bytes]:
        for at in range(start, until, 1000):
            if at > 5000:
                await self.gate.wait()
            yield DATA[at : min(at + 1000, until)]
        if breaks:
            await asyncio.sleep(0.05)
            raise ConnectionError("breaks off")

    async def manifest(self, request: Request) -> Response:
        return Response(wire.encode(sealed()))

    async def relays(self, request: Request) -> Response:
        return Response(wire.encode(Relays(relays=[])))

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/blobs/{digest}", self.blob),
                Route("/v1/runs/test/manifests/{digest}", self.manifest),
                Route("/v1/runs/test/relays", self.relays),
            ]
        )


@asynccontextmanager
async def served(app: Starlette) -> AsyncIterator[str]:
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    await task
    listener.close()


@asynccontextmanager
async def session_with(url: str) -> AsyncIterator[Session]:
    info = RunInfo(
        run="test",
        coordinator="n1",
        status="running",
        version=1,
        profile="",
        profiles=[],
        dtype="float32",
        vocab=32,
        eos_ids=[2],
        model_files=[],
        max_staleness=2,
        heartbeat_s=1.0,
    )
    keys = {"coordinator": NODE.public, "weights": TRAINER.public}
    session = Session(Client(url, NODE, patience_s=2.0), "test", info, keys)
    yield session
    await session.client.close()


def test_a_download_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    async def scene() -> None:
        origin = Origin()
        origin.breaks = [300_000, 200_000]
        async with served(origin.app()) as url, session_with(url) as session:
            await Downloads(session, tmp_path, use_relays=False).fetch([SHARD])
        assert (tmp_path / SHARD.digest).read_bytes() == DATA
        starts = [int(asked.removeprefix("bytes=").removesuffix("-") or 0) for asked in origin.ranges]
        assert starts == [0, 300_000, 500_000]

    asyncio.run(scene())


def test_a_restart_goes_on_from_what_is_on_disk(tmp_path: Path) -> None:
    async def scene() -> None:
        origin = Origin()
        (tmp_path / f"{SHARD.digest}.part").write_bytes(DATA[:700_000])
        async with served(origin.app()) as url, session_with(url) as session:
            await Downloads(session, tmp_path, use_relays=False).fetch([SHARD])
        assert origin.ranges == ["bytes=700000-"]
        assert [path.name for path in tmp_path.iterdir()] == [SHARD.digest]

    asyncio.run(scene())


@pytest.mark.parametrize("size", [100, len(DATA), len(DATA) + 7], ids=["some", "all", "too much"])
def test_wrong_bytes_on_disk_are_fetched_anew(size: int, tmp_path: Path) -> None:
    async def scene() -> None:
        origin = Origin()
        (tmp_path / f"{SHARD.digest}.part").write_bytes(b"\1" * size)
        async with served(origin.app()) as url, session_with(url) as session:
            await Downloads(session, tmp_path, use_relays=False).fetch([SHARD])
        assert (tmp_path / SHARD.digest).read_bytes() == DATA
        assert origin.ranges[-1] == ""

    asyncio.run(scene())


def test_what_came_before_nobody_answers_is_kept(tmp_path: Path) -> None:
    async def scene() -> None:
        origin = Origin()
        origin.breaks = [1000] * 99
        async with served(origin.app()) as url, session_with(url) as session:
            session.client.patience_s = 0.0
            with pytest.raises(Unreachable):
                await Downloads(session, tmp_path, use_relays=False).fetch([SHARD])
        assert (tmp_path / f"{SHARD.digest}.part").read_bytes() == DATA[:1000]

    asyncio.run(scene())


@pytest.mark.parametrize("asked", ["", "bytes=2000-9999"], ids=["whole", "a range"])
def test_a_relay_passes_on_what_is_still_coming_in(asked: str, tmp_path: Path) -> None:
    async def scene() -> None:
        origin = Origin()
        origin.gate.clear()
        async with served(origin.app()) as url, session_with(url) as session:
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
