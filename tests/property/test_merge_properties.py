"""A merged matrix has the bits that docs/protocol.md says, however the work is cut up; no changed byte is taken."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.numerics import merge as merging
from farflung.numerics.merge import Factors, factors, merge, merged
from farflung.numerics.rounding import dithered
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import WeightsError
from farflung.protocol.messages import Adapter, Manifest, Shard, Tensor
from farflung.weights import adapters
from farflung.weights.manifest import target_digest

SIZES, RANKS = st.integers(0, 40), st.integers(1, 70)
EXPONENTS = st.integers(-60, -20)


def some(height: int, width: int, rank: int, exponent: int, seed: int) -> tuple[torch.Tensor, Factors]:
    """A base and an adapter, with the largest whole numbers among the random ones."""
    drawn = torch.Generator().manual_seed(seed)
    base = torch.randn(height, width, generator=drawn).mul_(0.05).bfloat16()
    B, A = (
        torch.randint(-(2**15), 2**15, shape, generator=drawn, dtype=torch.int16)
        for shape in ((height, rank), (rank, width))
    )
    for one in (B, A):
        one.view(-1)[::3] = -(2**15)
    return base, Factors("w", exponent, B, A)


def by_the_book(base: torch.Tensor, adapter: Factors) -> np.ndarray:
    """Bits of the merged values, computed one by one with Python's integers for the sums."""
    B, A, W = adapter.B.tolist(), adapter.A.tolist(), base.float().tolist()
    found: list[int] = []
    for i, row in enumerate(W):
        for j, value in enumerate(row):
            total = sum(B[i][k] * A[k][j] for k in range(len(A)))
            rounded = np.float32(np.float64(value) + np.float64(total) * np.float64(2.0) ** adapter.exponent)
            threshold = (i * len(row) + j) * 40_503 % 65_536
            found.append((int(rounded.view(np.uint32)) + threshold) >> 16)
    return np.array(found, np.uint16).reshape(base.shape)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16)


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, RANKS, EXPONENTS, st.integers(0, 10**6))
def test_it_comes_to_the_bits_of_the_definition(height, width, rank, exponent, seed) -> None:
    base, adapter = some(height, width, rank, exponent, seed)
    assert np.array_equal(bits(merge(base, adapter)), by_the_book(base, adapter))


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 50), st.integers(1, 700), st.integers(1, 300), EXPONENTS, st.integers(0, 10**6))
def test_blocks_threads_and_the_order_of_ranks_change_nothing(height, width, rank, exponent, seed) -> None:
    base, adapter = some(height, width, rank, exponent, seed)
    expected, before, sizes = merge(base, adapter), torch.get_num_threads(), merging.blocks
    order = torch.randperm(rank, generator=torch.Generator().manual_seed(seed))
    other = Factors("w", exponent, adapter.B[:, order], adapter.A[order])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for size in (1, 5_000, 1 << 20):
                merging.blocks = lambda device, size=size: sizes(device)._replace(merged=size)
                assert torch.equal(merge(base, other).view(torch.int16), expected.view(torch.int16))
    finally:
        torch.set_num_threads(before)
        merging.blocks = sizes


def test_the_longest_sums_are_exact() -> None:
    """4,096 products of 2^30: an odd one out shows in the last bit of 2^42."""
    B, A = torch.full((1, 4096), -(2**15), dtype=torch.int16), torch.full((4096, 1), -(2**15), dtype=torch.int16)
    B[0, 7], A[7, 0] = 1, 1
    exact = 4095 * 2**30 + 1
    assert float((B.double() @ A.double())[0, 0]) == exact
    found = merge(torch.full((1, 1), -float(2**42)).bfloat16(), Factors("w", 0, B, A))
    assert float(found) == float(dithered(torch.tensor([[float(exact - 2**42)]])))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 8), st.integers(-30, 30), st.integers(0, 10**6))
def test_an_adapter_is_told_within_its_last_place(height, width, rank, power, seed) -> None:
    drawn = torch.Generator().manual_seed(seed)
    B, A = torch.randn(height, rank, generator=drawn) * 2.0**power, torch.randn(rank, width, generator=drawn)
    found = factors("w", B, A, 2.0)
    told = (found.B.double() @ found.A.double()) * 2.0**found.exponent
    meant = 2.0 * B.double() @ A.double()
    most = 2.0 * (B.abs().max() * A.abs().max()).double() if meant.numel() else 0.0
    assert ((told - meant).abs() <= rank * most * 2.0**-13).all()


def test_nothing_added_leaves_a_base_as_it_is() -> None:
    base, _ = some(30, 70, 1, 0, 1)
    nothing = factors("w", torch.zeros(30, 2), torch.randn(2, 70), 2.0)
    assert torch.equal(merge(base, nothing).view(torch.int16), base.view(torch.int16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_adapter_that_is_not_finite_is_not_published(value: float) -> None:
    B, A = torch.ones(3, 2), torch.ones(2, 4)
    A[1, 2] = value
    with pytest.raises(WeightsError, match=r"the adapter of w holds infinities or NaNs; lower learn\.lr"):
        factors("w", B, A, 1.0)
    with pytest.raises(WeightsError, match="holds infinities or NaNs"):
        factors("w", B, torch.ones(2, 4), value)


def test_what_overflows_is_refused() -> None:
    base, adapter = some(3, 4, 2, 200, 1)
    with pytest.raises(WeightsError, match="with its adapter holds infinities"):
        merge(base, adapter)


# --- shards ----------------------------------------------------------------------------------------------------------


def version(base: torch.Tensor, adapter: Factors, folder: Path) -> tuple[Manifest, bytes, Callable[[str], Path]]:
    """A manifest with one base shard, which nobody reads, and one shard of adapters, on disk."""
    data = adapters.pack([adapter])
    shards = [Shard(digest="0" * 64, size_bytes=1)]
    shards.append(Shard(digest=digest_of(data), size_bytes=len(data)))
    tensors = [Tensor(name="w", dtype="bfloat16", shape=list(base.shape), digest="1" * 64, shard=0)]
    manifest = Manifest(
        run="test", step=1, base_step=1, parent="", digest=target_digest(tensors), tensors=tensors, shards=shards,
        secret_commitment="0" * 64, made_at=0.0, expires_at=1.0,
        adapters=[Adapter(name="w", rank=adapter.B.shape[1], exponent=adapter.exponent, shard=1)],
    )  # fmt: skip
    (folder / shards[1].digest).write_bytes(data)
    return manifest, data, lambda digest: folder / digest


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, RANKS, EXPONENTS, st.integers(0, 10**6))
def test_a_shard_brings_back_what_was_packed(tmp_path_factory, height, width, rank, exponent, seed) -> None:
    base, adapter = some(height, width, rank, exponent, seed)
    manifest, data, path = version(base, adapter, tmp_path_factory.mktemp("shard"))
    assert len(data) == 2 * rank * (height + width)
    found = adapters.read(manifest, path)["w"]
    assert (found.name, found.exponent) == ("w", exponent)
    assert torch.equal(found.B, adapter.B)
    assert torch.equal(found.A, adapter.A)
    values = adapters.merged(manifest.tensors[0], bits(base).reshape(-1), found)
    assert np.array_equal(values, bits(merge(base, adapter)).reshape(-1))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_changed_shard_is_refused(tmp_path_factory, data) -> None:
    manifest, held, path = version(*some(6, 9, 3, -40, 1), tmp_path_factory.mktemp("shard"))
    spoiled = bytearray(held)
    for _ in range(data.draw(st.integers(1, 3))):
        spoiled[data.draw(st.integers(0, len(spoiled) - 1))] ^= data.draw(st.integers(1, 255))
    spoiled = spoiled[: data.draw(st.integers(0, len(spoiled)))] + bytes(data.draw(st.integers(0, 3)))
    if bytes(spoiled) == held:
        return
    path(manifest.shards[1].digest).write_bytes(spoiled)
    with pytest.raises(WeightsError, match="shard"):
        adapters.read(manifest, path)
    with pytest.raises(WeightsError, match="cannot be read"):
        adapters.read(msgspec.structs.replace(manifest, shards=[manifest.shards[0]] * 2), lambda _: Path("/none"))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 8), st.integers(-40, 40), st.integers(0, 10**6))
def test_it_is_merged_to_the_same_bits_where_nobody_waits_for_the_device(height, width, rank, scale, seed) -> None:
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(height, width, generator=draw).bfloat16()
    B, A = (torch.randn(*shape, generator=draw) * 2.0**scale for shape in ((height, rank), (rank, width)))
    for one in (B, torch.zeros_like(B)):
        assert torch.equal(merged(base, one, A, 1.7), merge(base, factors("w", one, A, 1.7)))
