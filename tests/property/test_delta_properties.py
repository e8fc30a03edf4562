"""Whatever two versions of a shard hold, the newer comes back bit for bit; a stranger's bytes break nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.protocol import wire
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import FarflungError, WeightsError
from farflung.protocol.identity import Key, Signed, seal
from farflung.protocol.messages import Manifest, Shard, Tensor
from farflung.weights import codec, delta
from farflung.weights.manifest import KIND, check_shard, manifest_digest, open_manifest, target_digest
from farflung.weights.patch import check_tensor

INTS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
ODD = {
    1: [0x00, 0x80, 0x7F, 0xFF, 0x7C, 0xFC, 0x01, 0x81],
    2: [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x7FFF, 0x0001, 0x8001, 0x7C00],
    4: [0x00000000, 0x80000000, 0x7F800000, 0x7FC00001, 0xFFFFFFFF, 0x7FFFFFFF, 0x00000001, 0x80000001],
}
"""Both zeros, infinities, NaNs with payloads, the smallest numbers: as fp8, bf16 or fp16, fp32."""


@st.composite
def versions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two versions of one tensor: noise, real-looking weights or odd values, of which none, some or all change."""
    width = draw(st.sampled_from(sorted(INTS)))
    size = draw(st.sampled_from([0, 1, 2, 7, 31, 300, 5000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    old = rng.integers(0, 1 << 8 * width, size, dtype=np.uint64).astype(INTS[width])
    if draw(st.booleans()) and width > 1:
        small = (rng.normal(size=size) * 0.1).astype(np.float32).view(np.uint32)
        old = (small >> (32 - 8 * width)).astype(INTS[width])
    if size:
        odd = rng.integers(0, size, min(size, 8))
        old[odd] = rng.choice(np.array(ODD[width], INTS[width]), len(odd))
    new = old.copy()
    is_changed = rng.random(size) < draw(st.sampled_from([0.0, 0.003, 0.1, 0.5, 0.97, 1.0]))
    moved = rng.integers(-3, 4, size).astype(f"i{width}").view(INTS[width])
    new[is_changed] = (old + moved)[is_changed] if draw(st.booleans()) else rng.permutation(old)[is_changed]
    return old, new


shards = st.lists(versions(), min_size=1, max_size=5)


def sizes(shard: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[int, int]]:
    return [(old.size, old.itemsize) for old, _ in shard]


def encoded(shard: list[tuple[np.ndarray, np.ndarray]]) -> bytes:
    return delta.encode([old for old, _ in shard], [new for _, new in shard])


@given(shards)
def test_the_newer_version_comes_back_bit_for_bit(shard: list[tuple[np.ndarray, np.ndarray]]) -> None:
    olds = [old.copy() for old, _ in shard]
    found = list(delta.decode(encoded(shard), olds, sizes(shard)))
    assert [one.tobytes() for one in found] == [new.tobytes() for _, new in shard]
    assert [one.tobytes() for one in olds] == [old.tobytes() for old, _ in shard], "the base is only read"


@given(shards, st.data())
def test_bytes_of_a_stranger_are_refused_or_come_to_tensors_of_the_right_size(
    shard: list[tuple[np.ndarray, np.ndarray]], data: st.DataObject
) -> None:
    honest = bytearray(encoded(shard))
    for _ in range(data.draw(st.integers(1, 3))):
        honest[data.draw(st.integers(0, len(honest) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(honest)))
    hostile = bytes(honest[:cut]) + data.draw(st.binary(max_size=4)) if data.draw(st.booleans()) else bytes(honest)
    try:
        found = list(delta.decode(hostile, [old for old, _ in shard], sizes(shard)))
    except WeightsError:
        return
    assert [(one.size, one.itemsize) for one in found] == sizes(shard)


@given(st.binary(max_size=200), st.lists(st.tuples(st.integers(0, 1000), st.sampled_from([1, 2, 4])), max_size=4))
def test_noise_is_refused_or_comes_to_tensors_of_the_right_size(data: bytes, sizes: list[tuple[int, int]]) -> None:
    olds = [np.zeros(count, INTS[width]) for count, width in sizes]
    try:
        found = list(delta.decode(data, olds, sizes))
    except WeightsError:
        return
    assert [(one.size, one.itemsize) for one in found] == sizes


def sealed() -> tuple[Signed, bytes, np.ndarray, np.ndarray]:
    """A manifest with one delta, the delta, and what it leads from and to."""
    rng = np.random.default_rng(3)
    old = ((rng.normal(size=500) * 0.05).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    new = old + (rng.random(500) < 0.1).astype(np.uint16)
    data = delta.encode([old], [new])
    tensor = Tensor(name="w", dtype="bfloat16", shape=[500], digest=digest_of(new.tobytes()), shard=0)
    manifest = Manifest(
        run="demo",
        step=2,
        base_step=1,
        parent="1" * 64,
        digest=target_digest([tensor]),
        tensors=[tensor],
        shards=[],
        deltas=[Shard(digest=digest_of(data), size_bytes=len(data))],
        secret_commitment="0" * 64,
        made_at=0.0,
        expires_at=1.0,
    )
    return seal(KEY, KIND, manifest), data, old, new


KEY = Key(b"k" * 32)
SIGNED, DATA, OLD, NEW = sealed()
SEALED = wire.encode(SIGNED)


@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_no_changed_byte_of_a_manifest_is_taken(at: int, flip: int) -> None:
    changed = SEALED[:at] + bytes([SEALED[at] ^ flip]) + SEALED[at + 1 :]
    with pytest.raises(FarflungError):
        open_manifest(wire.decode(changed, Signed), KEY.public, "demo", manifest_digest(SIGNED))


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_no_changed_byte_of_a_shard_is_taken_and_none_comes_to_the_digest(at: int, flip: int) -> None:
    """Refused by its own digest; and were it not, by that of what it comes to."""
    manifest = open_manifest(SIGNED, KEY.public, "demo", manifest_digest(SIGNED))
    changed = DATA[:at] + bytes([DATA[at] ^ flip]) + DATA[at + 1 :]
    with pytest.raises(WeightsError):
        check_shard(changed, manifest.deltas[0].digest, manifest.deltas[0].size_bytes)
    try:
        (found,) = delta.decode(changed, [OLD], [(OLD.size, 2)])
        check_tensor(manifest.tensors[0], found, manifest.step)
    except WeightsError:
        return
    assert found.tobytes() == NEW.tobytes()


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50), st.sampled_from([1, 16, 300, 70_000, 2**32]))
def test_numbers_come_back(values: list[int], below: int) -> None:
    given_values = np.array([value % below for value in values], np.uint64)
    writer = codec.Writer()
    writer.integers(given_values)
    reader = codec.Reader(writer.done())
    assert reader.integers(len(given_values)).tolist() == given_values.tolist()
    reader.finish()


@given(st.integers(0, 3000), st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.99, 1.0]), st.integers(0, 2**32))
def test_bits_come_back(size: int, share: float, seed: int) -> None:
    bits = np.random.default_rng(seed).random(size) < share
    writer = codec.Writer()
    writer.bits(bits)
    reader = codec.Reader(writer.done())
    assert reader.bits(size).tolist() == bits.tolist()
    reader.finish()
