"""Adapters on their way: published beside a base that travels once, merged by whoever fetches them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch

from adapting import batch, learner
from farflung.learner import checkpoint
from farflung.learner.optimise import Learner
from farflung.net.client import Client
from farflung.protocol.errors import WeightsError
from farflung.protocol.identity import seal
from farflung.protocol.messages import Manifest
from farflung.weights import publish as publishing
from farflung.weights.manifest import KIND, check_follows, manifest_digest, open_manifest, target_digest
from farflung.weights.mirror import Mirror
from farflung.weights.publish import Adapted, Publisher
from farflung.weights.shard_gc import needless
from farflung.weights.tensors import tensors
from following import node, same
from standin import TRAINER, Source, served

RANK = 4
"""On matrices of 16 × 32 to 48 × 32: half their numbers."""


def adapted_learner(device: str = "cpu") -> Learner:
    return learner(RANK, device)


class Run:
    """A trainer's side: adapters in training, and what was published of them."""

    def __init__(self, origin: Source, url: str, device: str) -> None:
        self.origin, self.learner = origin, adapted_learner(device)
        self.client = Client(url, TRAINER, patience_s=1.0)
        self.publisher = Publisher(self.client, TRAINER, "test", 16)
        self.digests: list[str] = []
        self.published: list[dict[str, torch.Tensor]] = []

    async def step(self, *, is_merged: bool = False) -> Manifest:
        step, policy = len(self.digests), self.learner.policy
        if step:
            self.learner.step(batch(step))
        signed = await self.publisher.publish(
            policy.tensors(), step=step, parent=self.digests[-1] if step else "", commitment="0" * 64, now=1.0,
            adapted=None if is_merged else Adapted(policy.base, policy.factors()),
        )  # fmt: skip
        self.published.append({name: tensor.cpu().clone() for name, tensor in policy.tensors()})
        return self.add(signed)

    def add(self, signed: Any) -> Manifest:
        digest = manifest_digest(signed)
        self.origin.manifests[digest] = signed
        self.digests.append(digest)
        return open_manifest(signed, TRAINER.public, "test", digest)


@asynccontextmanager
async def run(steps: int = 0, device: str = "cpu") -> AsyncIterator[Run]:
    origin = Source()
    async with served(origin.app()) as url:
        found = Run(origin, url, device)
        for _ in range(steps):
            await found.step()
        yield found
        await found.client.close()


def manifest_of(of: Run, step: int) -> Manifest:
    return open_manifest(of.origin.manifests[of.digests[step]], TRAINER.public, "test", of.digests[step])


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "SHARD_BYTES", 10_000)


def test_a_node_that_follows_fetches_adapters_only(tmp_path: Path) -> None:
    async def scene() -> None:
        async with run(steps=1) as of, node(of, tmp_path) as versions:
            base = await versions.fetch(of.digests[0])
            assert same(versions, of, 0)
            assert not base.adapters, "B is zero"
            for step in range(1, 4):
                manifest = await of.step()
                of.origin.sent.clear()
                assert manifest.shards[: manifest.base_shards] == base.shards
                assert manifest.delta_bytes == sum(2 * RANK * sum(shape) for shape in adapted_shapes(of))
                await versions.fetch(of.digests[step])
                assert same(versions, of, step)
                assert set(of.origin.sent) == {shard.digest for shard in manifest.shards[manifest.base_shards :]}
            assert any(not torch.equal(of.published[3][name], tensor) for name, tensor in of.published[0].items())

    asyncio.run(scene())


def adapted_shapes(of: Run) -> list[torch.Size]:
    return [tensor.shape for name, tensor in of.published[0].items() if "proj" in name]


def test_one_that_joins_late_needs_the_base_and_one_version(tmp_path: Path) -> None:
    async def scene() -> None:
        async with run(steps=5) as of, node(of, tmp_path) as versions:
            manifest = await versions.fetch(of.digests[4])
            assert same(versions, of, 4)
            assert sorted(of.origin.sent) == sorted(shard.digest for shard in manifest.shards)
            kept = {shard.digest for shard in manifest.shards[: manifest.base_shards]}
            assert {path.name for path in tmp_path.iterdir()} == kept | {f"{of.digests[4]}.whole"}
            dead, first = needless({step: manifest_of(of, step) for step in range(5)}, oldest=3)
            assert first == 3
            assert not kept & set(dead), "the base stays"
            assert len(dead) == 2 * len(manifest.shards[manifest.base_shards :])

    asyncio.run(scene())


def test_a_restart_needs_no_base_again(tmp_path: Path) -> None:
    async def scene() -> None:
        async with run(steps=3) as of:
            async with node(of, tmp_path) as versions:
                await versions.fetch(of.digests[2])
            manifest = await of.step()
            of.origin.sent.clear()
            async with node(of, tmp_path) as versions:
                await versions.fetch(of.digests[3])
                assert same(versions, of, 3)
            assert len(of.origin.sent) == len(manifest.shards) - manifest.base_shards

    asyncio.run(scene())


def test_a_relay_passes_on_base_and_adapters(tmp_path: Path) -> None:
    async def scene() -> None:
        async with run(steps=3) as of, node(of, tmp_path, patch=None, use_relays=False) as versions:
            mirror = Mirror(versions)
            for digest in of.digests:
                await mirror.follow(digest)
            there = {path.name for path in tmp_path.iterdir()}
            assert there == {shard.digest for step in range(3) for shard in manifest_of(of, step).shards}
            assert len(of.origin.sent) == len(there), "the base came once"
            assert all(versions.is_wanted(shard) and versions.size_bytes(shard) for shard in there)

    asyncio.run(scene())


def test_a_damaged_base_is_fetched_anew_and_a_sound_one_kept(tmp_path: Path) -> None:
    async def scene() -> None:
        async with run(steps=2) as of, node(of, tmp_path) as versions:
            manifest = await versions.fetch(of.digests[1])
            await of.step()
            first, second = (shard.digest for shard in manifest.shards[:2])
            data = bytearray(versions.path(first).read_bytes())
            data[-3] ^= 0x40
            versions.path(first).write_bytes(data)
            of.origin.sent.clear()
            with pytest.raises(WeightsError, match="download it from another source"):
                await versions.fetch(of.digests[2])
            await versions.fetch(of.digests[2])
            assert same(versions, of, 2)
            assert first in of.origin.sent
            assert second not in of.origin.sent
            whole = versions.whole(of.digests[2])
            whole.write_bytes(bytes(whole.stat().st_size))
            of.origin.sent.clear()
            with pytest.raises(WeightsError, match="does not match its digest"):
                dict(tensors(versions, of.digests[2]))
            await versions.fetch(of.digests[2])
            assert same(versions, of, 2)
            assert first not in of.origin.sent, "what was wrong was merged of it"

    asyncio.run(scene())


def test_adapters_on_another_base_are_refused(tmp_path: Path) -> None:
    """Sealed by the trainer's key, each shard as named: and yet it does not come to the digests."""

    async def scene() -> None:
        async with run(steps=2) as of, node(of, tmp_path) as versions:
            right = manifest_of(of, 1)
            other = adapted_learner()
            for name, tensor in other.policy.model.named_parameters():
                if name.endswith("proj.weight"):
                    tensor.data.mul_(1.5)
            of.publisher.forget()
            wrong = await of.publisher.publish(
                of.learner.policy.tensors(), step=1, parent=of.digests[0], commitment="0" * 64, now=1.0,
                adapted=Adapted(other.policy.base, of.learner.policy.factors()),
            )  # fmt: skip
            of.add(wrong)
            with pytest.raises(WeightsError, match="does not match its digest"):
                await versions.fetch(of.digests[-1])
            swapped = [*reversed(right.shards[: right.base_shards]), *right.shards[right.base_shards :]]
            of.add(seal(TRAINER, KIND, msgspec.structs.replace(right, shards=swapped)))
            with pytest.raises(WeightsError, match="does not hold the tensors its manifest names"):
                await versions.fetch(of.digests[-1])
            odd = [msgspec.structs.replace(one, exponent=one.exponent + 1) for one in right.adapters]
            of.add(seal(TRAINER, KIND, msgspec.structs.replace(right, adapters=odd)))
            with pytest.raises(WeightsError, match="does not match its digest"):
                await versions.fetch(of.digests[-1])
            huge = [msgspec.structs.replace(one, exponent=230) for one in right.adapters]
            of.add(seal(TRAINER, KIND, msgspec.structs.replace(right, adapters=huge)))
            with pytest.raises(WeightsError, match="holds infinities or NaNs"):
                await versions.fetch(of.digests[-1])
            assert not list(tmp_path.glob("*.whole"))
            await versions.fetch(of.digests[1])
            assert same(versions, of, 1)

    asyncio.run(scene())


def test_a_node_without_room_for_base_and_version_says_so(tmp_path: Path) -> None:
    async def scene() -> None:
        async with run(steps=2) as of, node(of, tmp_path, limit_bytes=60_000) as versions:
            with pytest.raises(WeightsError, match="bytes of disk, this node allows 60,000"):
                await versions.fetch(of.digests[1])

    asyncio.run(scene())


def test_a_trainer_that_comes_back_goes_on_and_sends_no_base_again(tmp_path: Path, device) -> None:
    async def scene() -> None:
        async with run(steps=3, device=device) as of, node(of, tmp_path / "node") as versions:
            saved = checkpoint.save(of.learner, 2, tmp_path / "checkpoints")
            kept = dict(checkpoint.published(saved.path, is_dithered=True))
            assert all(torch.equal(tensor, kept[name]) for name, tensor in of.published[2].items())
            of.learner = adapted_learner(device)
            checkpoint.load(of.learner, saved.path)
            of.publisher = Publisher(of.client, TRAINER, "test", 16)
            await of.publisher.rebase(of.learner.policy.tensors(), of.digests[-1])
            held = dict(of.origin.blobs)
            of.origin.blobs.clear()
            manifest = await of.step()
            assert set(of.origin.blobs) == {shard.digest for shard in manifest.shards[manifest.base_shards :]}
            of.origin.blobs |= held
            await versions.fetch(of.digests[3])
            assert same(versions, of, 3)
            of.learner = adapted_learner(device)
            with pytest.raises(WeightsError, match="resume on the hardware"):
                await of.publisher.rebase(of.learner.policy.tensors(), of.digests[-1])

    asyncio.run(scene())


def test_adapters_and_differences_take_turns(tmp_path: Path) -> None:
    """`learn.lora_publish` may change when a run goes on: each kind leads on from the other."""

    async def scene() -> None:
        async with run(steps=2) as of, node(of, tmp_path / "follows") as versions, node(of, tmp_path / "late") as late:
            await versions.fetch(of.digests[1])
            await of.publisher.rebase(of.learner.policy.tensors(), of.digests[-1])
            merged = await of.step(is_merged=True)
            assert merged.deltas
            check_follows(merged, manifest_of(of, 1))
            for each in (versions, late):
                await each.fetch(of.digests[2])
                assert same(each, of, 2)
            assert (await of.step()).adapters
            await versions.fetch(of.digests[3])
            assert same(versions, of, 3)

    asyncio.run(scene())


def test_what_is_merged_is_what_a_policy_of_plain_weights_would_publish(device) -> None:
    """Within one place of bfloat16, of what the trainer computes with."""
    one = adapted_learner(device)
    for number in range(3):
        one.step(batch(number))
    state = one.policy.model.state_dict()
    for name, tensor in one.policy.tensors():
        if "proj" not in name:
            continue
        layer = name.removesuffix("weight")
        exact = state[name] + 2.0 * state[f"{layer}lora_B"] @ state[f"{layer}lora_A"]
        assert ((tensor.float() - exact).abs() <= 2.0**-7 * exact.abs() + 1e-5).all()
        assert not torch.equal(tensor.float(), state[name])
    assert target_digest([]) != target_digest(publishing.describe(*pair, 0) for pair in one.policy.tensors())
