"""A coordinator as far as weights go: manifests, shards by range and a list of relays, over a real socket."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from farflung.net.client import Client
from farflung.net.server import listen, problem_response
from farflung.net.session import PURPOSES, Session, check_run, delegate
from farflung.protocol import wire
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import NotFound
from farflung.protocol.identity import Key, Signed, seal
from farflung.protocol.messages import Relays, RelayView, Run, RunInfo
from farflung.protocol.numerics import NOISE
from farflung.weights.manifest import manifest_digest
from farflung.weights.origin import byte_range

TRAINER, NODE, ROOT, OPERATOR = (Key(letter * 32) for letter in (b"t", b"s", b"r", b"o"))
INFO = RunInfo(
    run="test", coordinator=OPERATOR.id, status="running", version=1, profile="", profiles={}, dtype="float32",
    vocab=32, eos_ids=[2], model_files=[], max_staleness=2, heartbeat_s=1.0, noise=NOISE,
)  # fmt: skip


def descriptor(*weights: bytes) -> Run:
    """What the root says of a run whose weights these keys may sign."""
    others = [(purpose, OPERATOR.public) for purpose in PURPOSES if purpose != "weights"]
    delegated = [*others, *(("weights", public) for public in weights)]
    signed = [delegate(ROOT, "test", purpose, public, 4e9) for purpose, public in delegated]
    return Run(root=ROOT.public, delegations=signed, info=seal(OPERATOR, "run", INFO))


class Source:
    """Blobs and manifests in memory.

    `breaks` says where the next answers end early, `gate` holds back what is beyond the first 5,000 bytes of a shard.
    """

    def __init__(self, signed: Signed | None = None, shard: bytes | None = None) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, Signed] = {}
        self.relays: list[str] = []
        self.sent: list[str] = []
        """Digests of shards, one for each time that one was asked for."""
        self.ranges: list[str] = []
        self.breaks: list[int] = []
        self.descriptor = descriptor(TRAINER.public)
        self.gate = asyncio.Event()
        self.gate.set()
        if signed is not None:
            self.manifests[manifest_digest(signed)] = signed
        if shard is not None:
            self.blobs[digest_of(shard)] = shard

    @property
    def sent_bytes(self) -> int:
        """What whole answers to all of these would come to."""
        return sum(len(self.blobs[digest]) for digest in self.sent)

    async def run(self, request: Request) -> Response:
        return Response(wire.encode(self.descriptor))

    async def manifest(self, request: Request) -> Response:
        return Response(wire.encode(self.manifests[request.path_params["digest"]]))

    async def list(self, request: Request) -> Response:
        views = [RelayView(node=f"n{number}", url=url) for number, url in enumerate(self.relays)]
        return Response(wire.encode(Relays(relays=views)))

    async def put(self, request: Request) -> Response:
        self.blobs[request.path_params["digest"]] = await request.body()
        return Response()

    async def blob(self, request: Request) -> Response:
        digest, asked = request.path_params["digest"], request.headers.get("range", "")
        if digest not in self.blobs:
            return problem_response(NotFound(f"there is no blob {digest}"))
        self.sent.append(digest)
        self.ranges.append(asked)
        data = self.blobs[digest]
        start, end = byte_range(asked, len(data))
        until = start + self.breaks.pop(0) if self.breaks else end
        headers = {"content-length": str(end - start), "content-range": f"bytes {start}-{end - 1}/{len(data)}"}
        return StreamingResponse(self._body(data, start, until, until < end), 206 if asked else 200, headers)

    async def _body(self, data: bytes, start: int, until: int, breaks: bool) -> AsyncIterator[bytes]:
        for at in range(start, until, 1000):
            if at > 5000:
                await self.gate.wait()
            yield data[at : min(at + 1000, until)]
        if breaks:
            await asyncio.sleep(0.05)
            raise ConnectionError("breaks off")

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/runs/test", self.run),
                Route("/v1/runs/test/manifests/{digest}", self.manifest),
                Route("/v1/runs/test/relays", self.list),
                Route("/v1/runs/test/blobs/{digest}", self.put, methods=["PUT"]),
                Route("/v1/blobs/{digest}", self.blob),
            ]
        )


@asynccontextmanager
async def served(app: Starlette) -> AsyncIterator[str]:
    """An application on a socket of its own; gives its address."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    await task
    listener.close()


@asynccontextmanager
async def session_with(url: str, patience_s: float = 1.0) -> AsyncIterator[Session]:
    """A node's stay at such a source."""
    checked = check_run(descriptor(TRAINER.public), "test", ROOT.public)
    session = Session(Client(url, NODE, patience_s=patience_s), "test", ROOT.public, checked)
    yield session
    await session.client.close()
