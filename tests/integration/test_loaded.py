"""Which version an engine holds: claimed once it is whole, never after a fault, and never with values of another."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import save  # noqa: E402

from farflung.engine.local import LocalEngine  # noqa: E402
from farflung.net.node_stats import NodeStats  # noqa: E402
from farflung.numerics.quantise import quantised  # noqa: E402
from farflung.protocol import probe  # noqa: E402
from farflung.protocol.digest import digest_of  # noqa: E402
from farflung.protocol.errors import WeightsError  # noqa: E402
from farflung.protocol.identity import seal  # noqa: E402
from farflung.protocol.messages import Manifest, Shard  # noqa: E402
from farflung.weights.cache import Versions  # noqa: E402
from farflung.weights.loaded import Loaded  # noqa: E402
from farflung.weights.manifest import KIND, manifest_digest, target_digest  # noqa: E402
from farflung.weights.publish import describe  # noqa: E402
from standin import TRAINER, Source, served, session_with  # noqa: E402

KEY, NONCE = "01" * 32, "ab" * 32
Weights = dict[str, torch.Tensor]


class World:
    """Versions 0 and 1 of a tiny model, fetched, and an engine of another that may load them."""

    def __init__(self, versions: Versions, engine: LocalEngine, weights: list[Weights], digests: list[str]) -> None:
        self.versions, self.engine, self.weights, self.digests = versions, engine, weights, digests
        self.stats = NodeStats()
        self.loaded = Loaded(engine, versions, stats=self.stats)

    def holds(self, weights: Weights) -> bool:
        return all(
            torch.equal(self.engine.model.state_dict()[name].bfloat16().cpu(), one) for name, one in weights.items()
        )

    def answer(self, version: int) -> str:
        """What a node with a version in its engine answers."""
        weights = self.weights[version]
        chosen = probe.slices(((name, one.shape) for name, one in weights.items()), bytes.fromhex(KEY))
        parts = [weights[name].flatten()[start:stop] for name, start, stop in chosen]
        return probe.answer(NONCE, torch.cat(parts).view(torch.int16).numpy().tobytes())

    def is_nothing_claimed(self) -> bool:
        with pytest.raises(WeightsError, match="no whole version"):
            self.loaded.possession(NONCE, KEY)
        return self.stats.loaded_step == -1 and not any(map(self.loaded.has, [*self.digests, ""]))


def version_of(weights: Weights, step: int, source: Source) -> str:
    """Publish a version; gives its manifest's digest."""
    shard = save(weights)
    described = [describe(name, tensor, 0) for name, tensor in weights.items()]
    manifest = Manifest(
        run="test", step=step, base_step=step, parent="", digest=target_digest(described), tensors=described,
        shards=[Shard(digest=digest_of(shard), size_bytes=len(shard))], secret_commitment="0" * 64, made_at=0.0,
        expires_at=2e9,
    )  # fmt: skip
    signed = seal(TRAINER, KIND, manifest)
    source.manifests[manifest_digest(signed)], source.blobs[digest_of(shard)] = signed, shard
    return manifest_digest(signed)


@pytest.fixture
def play(tiny_qwen, device: str, tmp_path: Path) -> Callable[[Callable[[World], Awaitable[None]]], None]:
    """Runs a scene in such a world."""

    @asynccontextmanager
    async def world() -> AsyncIterator[World]:
        source = Source()
        weights = [{n: p.detach().bfloat16() for n, p in tiny_qwen(seed).named_parameters()} for seed in (0, 1)]
        digests = [version_of(one, step, source) for step, one in enumerate(weights)]
        async with served(source.app()) as url, session_with(url) as session:
            versions = Versions(session, tmp_path)
            for digest in digests:
                await versions.fetch(digest)
            try:
                yield World(versions, LocalEngine(tiny_qwen(2).to(device)), weights, digests)
            finally:
                await versions.close()

    def run(scene: Callable[[World], Awaitable[None]]) -> None:
        async def main() -> None:
            async with world() as here:
                await scene(here)

        asyncio.run(main())

    return run


def test_a_version_is_loaded_once_and_anew_when_nobody_knows_what_is_there(play) -> None:
    async def scene(world: World) -> None:
        assert world.is_nothing_claimed()
        world.loaded.ensure(world.digests[1])
        assert world.holds(world.weights[1])
        assert [world.loaded.has(digest) for digest in world.digests] == [False, True]
        assert world.stats.loaded_step == 1
        world.engine.load(world.weights[0].items())  # behind its back
        world.loaded.ensure(world.digests[1])
        assert world.holds(world.weights[0]), "it was there, so nothing was loaded"
        world.loaded.invalidate()
        assert world.is_nothing_claimed()
        world.loaded.ensure(world.digests[1])
        assert world.holds(world.weights[1])

    play(scene)


def test_possession_is_of_the_weights_that_are_there_now(play) -> None:
    async def scene(world: World) -> None:
        for version in (0, 1, 0):
            world.loaded.ensure(world.digests[version])
            assert world.loaded.possession(NONCE, KEY) == world.answer(version)
            assert world.loaded.possession("ac" * 32, KEY) != world.answer(version), "an answer fits one nonce"
        assert world.answer(0) != world.answer(1)

    play(scene)


def test_after_a_damaged_shard_nothing_counts_as_loaded(play) -> None:
    async def scene(world: World) -> None:
        world.loaded.ensure(world.digests[0])
        path = world.versions.path(world.versions.known(world.digests[1]).shards[0].digest)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(WeightsError, match="hashes to"):
            world.loaded.ensure(world.digests[1])
        assert world.is_nothing_claimed()
        with pytest.raises(WeightsError, match="was not fetched"):
            world.loaded.ensure(world.digests[1])
        await world.versions.fetch(world.digests[1])
        world.loaded.ensure(world.digests[1])
        assert world.loaded.possession(NONCE, KEY) == world.answer(1)

    play(scene)


def test_after_any_fault_halfway_nothing_counts_as_loaded(play) -> None:
    async def scene(world: World) -> None:
        def breaking() -> Iterator[tuple[str, torch.Tensor]]:
            assert world.is_nothing_claimed(), "a heartbeat may ask halfway"
            yield next(iter(world.weights[1].items()))
            raise OSError("the disk is gone")

        world.loaded.ensure(world.digests[0])
        with pytest.raises(OSError, match="the disk is gone"):
            world.loaded.ensure(world.digests[1], breaking)
        assert world.is_nothing_claimed()
        with pytest.raises(WeightsError, match="tensors are missing"):
            world.loaded.ensure(world.digests[1], lambda: list(world.weights[1].items())[:3])
        assert world.is_nothing_claimed()
        world.loaded.ensure(world.digests[0])
        assert world.loaded.possession(NONCE, KEY) == world.answer(0)

    play(scene)


def test_weights_of_its_maker_need_no_file(play) -> None:
    async def scene(world: World) -> None:
        world.loaded.ensure("made here", world.weights[1].items)
        assert world.loaded.has("made here")
        assert world.holds(world.weights[1])

    play(scene)


def test_a_version_that_its_maker_holds_is_fetched_to_be_quantised(play) -> None:
    """A trainer has its own weights in the engine and none of them on disk."""

    async def scene(world: World) -> None:
        digest = world.digests[0]
        world.loaded.ensure(digest, world.weights[0].items)
        world.versions.discard(digest)
        await world.loaded.fetch(digest)
        assert not world.versions.has(digest), "as it is, it is there"
        await world.loaded.fetch(digest, "int8")
        world.loaded.ensure(digest, quantiser="int8")
        assert not world.holds(world.weights[0])

    play(scene)


def test_matrices_are_quantised_on_their_way_and_possession_is_of_what_was_published(play) -> None:
    async def scene(world: World) -> None:
        digest, key = world.digests[0], "11" * 32
        world.loaded.ensure(digest)
        shown = world.loaded.possession("00" * 32, key)
        world.loaded.ensure(digest, quantiser="int8")
        assert not world.loaded.has(digest, "")
        assert world.loaded.has(digest)
        held = world.engine.model.state_dict()
        expected = dict(quantised(world.weights[0].items(), "int8"))
        assert all(torch.equal(held[name], one.to(held[name])) for name, one in expected.items())
        assert not world.holds(world.weights[0])
        assert world.loaded.possession("00" * 32, key) == shown
        world.loaded.ensure(digest)
        assert world.holds(world.weights[0])

    play(scene)
