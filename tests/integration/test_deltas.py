"""Differences on their way: publish, follow, join late, and everything that can go wrong in between."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from farflung.net.client import Client
from farflung.protocol.errors import WeightsError
from farflung.protocol.messages import Manifest
from farflung.weights import delta, parts
from farflung.weights import publish as publishing
from farflung.weights.manifest import manifest_digest, open_manifest
from farflung.weights.mirror import Mirror
from farflung.weights.patch import patch
from farflung.weights.publish import Publisher
from farflung.weights.tensors import tensors
from following import node, same
from standin import TRAINER, Source, served

Weights = dict[str, torch.Tensor]


def first_weights() -> Weights:
    torch.manual_seed(0)
    return {
        "a": torch.randn(300, 200) * 0.05,
        "b": torch.randn(50) * 0.05,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(float("nan")),
        "c": torch.randn(400, 100) * 0.05,
    }


def moved(weights: Weights, lr: float = 1e-4) -> Weights:
    return {name: tensor - lr * torch.randn(tensor.shape).sign() for name, tensor in weights.items()}


def cast(weights: Weights, device: str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, tensor.to(device).bfloat16()) for name, tensor in weights.items())


class Run:
    """A trainer's side: weights that move, step after step, and what was published of them."""

    def __init__(self, origin: Source, url: str, anchor_every: int = 16, device: str = "cpu") -> None:
        self.origin, self.weights, self.device = origin, first_weights(), device
        self.client = Client(url, TRAINER, patience_s=1.0)
        self.publisher = Publisher(self.client, TRAINER, "test", anchor_every)
        self.digests: list[str] = []
        self.published: list[Weights] = []

    async def step(self, lr: float = 1e-4) -> Manifest:
        if self.digests:
            self.weights = moved(self.weights, lr)
        parent = self.digests[-1] if self.digests else ""
        step = len(self.digests)
        signed = await self.publisher.publish(
            cast(self.weights, self.device), step=step, parent=parent, commitment="0" * 64, now=1.0
        )
        digest = manifest_digest(signed)
        self.origin.manifests[digest] = signed
        self.digests.append(digest)
        self.published.append(dict(cast(self.weights)))
        return open_manifest(signed, TRAINER.public, "test", digest)


@asynccontextmanager
async def run(anchor_every: int = 16, steps: int = 0, device: str = "cpu") -> AsyncIterator[Run]:
    origin = Source()
    async with served(origin.app()) as url:
        found = Run(origin, url, anchor_every, device)
        for _ in range(steps):
            await found.step()
        yield found
        await found.client.close()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "SHARD_BYTES", 100_000)


def test_shards_told_in_another_order_hold_what_the_manifest_says(tmp_path: Path, monkeypatch) -> None:
    told, describe = [], publishing._describe_all

    def late(chunk: list[publishing.Named], shard: int) -> list[publishing.Tensor]:
        time.sleep(0.2 if shard == 0 else 0.0)
        told.append(shard)
        return describe(chunk, shard)

    monkeypatch.setattr(publishing, "_describe_all", late)

    async def scene() -> None:
        async with run(steps=2, anchor_every=1) as of, node(of, tmp_path) as versions:
            await versions.fetch(of.digests[1])
            assert same(versions, of, 1)

    asyncio.run(scene())
    assert told[0] != 0, "the first shard was told later than another"


def test_what_is_kept_of_a_step_takes_no_memory_of_the_device(tmp_path: Path, device: str) -> None:
    async def scene() -> None:
        async with run(steps=2, device=device) as of, node(of, tmp_path) as versions:
            await versions.fetch(of.digests[1])
            assert same(versions, of, 1)
            kept = of.publisher.published
            assert kept.keys() == of.weights.keys()
            assert {tensor.device.type for tensor in kept.values()} == {"cpu"}

    asyncio.run(scene())


def test_a_node_that_follows_fetches_differences_only(tmp_path: Path) -> None:
    async def scene() -> None:
        async with run(steps=1) as of, node(of, tmp_path) as versions:
            await versions.fetch(of.digests[0])
            whole_bytes = of.origin.sent_bytes
            for step in range(1, 4):
                manifest = await of.step()
                assert not manifest.shards
                assert len(manifest.deltas) == 2
                await versions.fetch(of.digests[step])
                assert same(versions, of, step)
            assert of.origin.sent_bytes - whole_bytes < whole_bytes
            assert not list(tmp_path.glob("*.draft"))

    asyncio.run(scene())


def test_tensors_larger_than_a_body_travel_in_parts(tmp_path: Path, monkeypatch) -> None:
    for module, name in ((publishing, "SHARD_BYTES"), (parts, "PART_BYTES")):
        monkeypatch.setattr(module, name, 2_000)

    async def scene() -> None:
        async with run(anchor_every=4, steps=3) as of, node(of, tmp_path) as versions:
            largest = max(tensor.nbytes for tensor in of.published[0].values())
            assert largest > 10_000
            for step in range(3):
                manifest = await versions.fetch(of.digests[step])
                assert max(shard.size_bytes for shard in manifest.shards or manifest.deltas) < 4_000
                assert same(versions, of, step)
            of.publisher = Publisher(of.client, TRAINER, "test", 4)
            await of.publisher.rebase(cast(of.weights), of.digests[2])
            assert not (await of.step()).shards
            await versions.fetch(of.digests[3])
            assert same(versions, of, 3)
            assert set(of.publisher.published) == set(of.weights)

    asyncio.run(scene())


def test_one_that_joins_late_takes_the_nearest_anchor_and_its_chain(tmp_path: Path) -> None:
    async def scene() -> None:
        async with run(anchor_every=4, steps=7) as of, node(of, tmp_path) as versions:
            manifest = await versions.fetch(of.digests[6])
            assert same(versions, of, 6)
            anchor = open_manifest(of.origin.manifests[of.digests[4]], TRAINER.public, "test", of.digests[4])
            assert anchor.shards
            assert anchor.deltas, "who follows need not fetch an anchor"
            needed = {shard.digest for shard in anchor.shards}
            needed |= {shard.digest for shard in manifest.deltas}
            assert needed < set(of.origin.sent)
            assert len(of.origin.sent) == 6
            assert {path.name for path in tmp_path.iterdir()} == {f"{of.digests[6]}.whole"}

    asyncio.run(scene())


def test_a_restart_starts_from_what_is_on_disk(tmp_path: Path) -> None:
    async def scene() -> None:
        async with run(steps=3) as of:
            async with node(of, tmp_path) as versions:
                await versions.fetch(of.digests[2])
            (tmp_path / "x.draft").write_bytes(b"a crash left it")
            of.origin.sent.clear()
            await of.step()
            async with node(of, tmp_path) as versions:
                await versions.fetch(of.digests[3])
                assert same(versions, of, 3)
            assert len(of.origin.sent) == 2, "the deltas of one step"
            assert not list(tmp_path.glob("*.draft"))

    asyncio.run(scene())


def test_deltas_that_are_gone_send_a_node_to_the_anchor(tmp_path: Path) -> None:
    async def scene() -> None:
        async with run(anchor_every=4, steps=2) as of, node(of, tmp_path) as versions:
            await versions.fetch(of.digests[1])
            for _ in range(4):
                manifest = await of.step()
            gone = open_manifest(of.origin.manifests[of.digests[2]], TRAINER.public, "test", of.digests[2])
            for shard in gone.deltas:
                del of.origin.blobs[shard.digest]
            await versions.fetch(of.digests[5])
            assert same(versions, of, manifest.step)

    asyncio.run(scene())


def test_a_damaged_base_never_comes_to_a_version(tmp_path: Path) -> None:
    async def scene() -> None:
        async with run(steps=2) as of, node(of, tmp_path) as versions:
            await versions.fetch(of.digests[1])
            await of.step()
            damaged = versions.whole(of.digests[1])
            data = bytearray(damaged.read_bytes())
            data[1001] ^= 0x40
            damaged.write_bytes(data)
            with pytest.raises(WeightsError, match="does not match its digest"):
                dict(tensors(versions, of.digests[1]))
            damaged.write_bytes(data)
            with pytest.raises(WeightsError):
                await versions.fetch(of.digests[2])
            assert not damaged.exists()
            await versions.fetch(of.digests[2])
            assert same(versions, of, 2)

    asyncio.run(scene())


def test_a_relay_keeps_what_followers_and_late_joiners_need(tmp_path: Path) -> None:
    async def scene() -> None:
        async with run(anchor_every=4, steps=6) as of, AsyncExitStack() as stack:
            versions = await stack.enter_async_context(node(of, tmp_path, patch=None, use_relays=False))
            mirror = Mirror(versions)
            await mirror.follow(of.digests[5])
            there = {path.name for path in tmp_path.iterdir()}
            assert there == set(of.origin.sent)
            assert len(there) == 6, "whole and deltas of the anchor, deltas of the step after"
            assert all(mirror.versions.is_wanted(shard) for shard in there)

    asyncio.run(scene())


def test_a_long_chain_of_large_differences_brings_an_anchor_forward() -> None:
    async def scene() -> None:
        async with run(steps=1) as of:
            kinds = [bool((await of.step(lr=0.05)).shards) for _ in range(6)]
            assert True in kinds
            assert False in kinds

    asyncio.run(scene())


def test_a_trainer_that_comes_back_goes_on_with_the_chain(tmp_path: Path) -> None:
    async def scene() -> None:
        async with run(anchor_every=4, steps=3) as of, node(of, tmp_path) as versions:
            before = of.publisher
            of.publisher = Publisher(of.client, TRAINER, "test", 4)
            await of.publisher.rebase(cast(of.weights), of.digests[-1])
            assert of.publisher._lineage_bytes == before._lineage_bytes
            assert not (await of.step()).shards
            await versions.fetch(of.digests[3])
            assert same(versions, of, 3)

    asyncio.run(scene())


def test_a_trainer_that_comes_back_with_other_weights_is_refused() -> None:
    async def scene() -> None:
        async with run(steps=2) as of:
            of.publisher = Publisher(of.client, TRAINER, "test", 4)
            with pytest.raises(WeightsError, match="resume on the hardware"):
                await of.publisher.rebase(cast(moved(of.weights, 0.01)), of.digests[-1])

    asyncio.run(scene())


def test_a_kill_in_the_middle_of_patching_leaves_nothing_that_counts(
    tmp_path: Path,
) -> None:
    """A child patches, stops after the first shard and is killed with -9; the next start patches it whole."""

    def patch_in_a_child(*arguments: Any) -> None:
        child = os.fork()
        if not child:
            decode = delta.decode
            delta.decode = lambda *given: (time.sleep(60) if given[2][0][0] < 60_000 else None, decode(*given))[1]
            patch(*arguments)
            os._exit(0)
        while not any(draft.stat().st_size for draft in tmp_path.glob("*.draft")):
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise WeightsError("killed")

    async def scene() -> None:
        async with run(steps=2) as of:
            async with node(of, tmp_path) as versions:
                await versions.fetch(of.digests[0])
                versions._patch = patch_in_a_child
                with pytest.raises(WeightsError, match="killed"):
                    await versions.fetch(of.digests[1])
                assert list(tmp_path.glob("*.draft"))
                assert not versions.whole(of.digests[1]).exists()
            async with node(of, tmp_path) as versions:
                assert not list(tmp_path.glob("*.draft"))
                assert "half patched" in versions.session.stats.last_error
                await versions.fetch(of.digests[1])
                assert same(versions, of, 1)

    asyncio.run(scene())
