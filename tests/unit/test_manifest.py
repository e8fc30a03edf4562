"""What makes an untrusted copy of the weights safe to load."""

import msgspec
import pytest

from farflung.protocol import wire
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import BadSignature, Malformed, OutOfRange, WeightsError
from farflung.protocol.identity import Key, Signed, seal
from farflung.protocol.messages import Adapter, Manifest, Shard, Tensor
from farflung.weights.manifest import by_shard, check_shard, manifest_digest, open_manifest, target_digest
from farflung.weights.origin import byte_range

KEY = Key(b"\7" * 32)
DATA = b"shard"


def tensor(name: str, digest: str = "11" * 32) -> Tensor:
    return Tensor(name=name, dtype="bfloat16", shape=[2, 3], digest=digest, shard=0)


def manifest(**changes: object) -> Manifest:
    tensors = [tensor("a"), tensor("b", "22" * 32)]
    made = Manifest(
        run="demo",
        step=3,
        base_step=3,
        parent="",
        digest=target_digest(tensors),
        tensors=tensors,
        shards=[Shard(digest=digest_of(DATA), size_bytes=len(DATA))],
        secret_commitment="0" * 64,
        made_at=0.0,
        expires_at=1.0,
    )
    return msgspec.structs.replace(made, **changes)


def opened(signed: Signed, **odd: object) -> Manifest:
    fields = {"public": KEY.public, "run": "demo", "digest": manifest_digest(signed)} | odd
    return open_manifest(signed, **fields)  # type: ignore[arg-type]


def test_a_manifest_of_the_trainer_opens() -> None:
    assert opened(seal(KEY, "manifest", manifest())) == manifest()


def test_another_version_than_the_one_asked_for_is_refused() -> None:
    """A relay that is behind, or lies, cannot choose the version."""
    old = seal(KEY, "manifest", manifest(step=2))
    with pytest.raises(WeightsError, match="asked for manifest"):
        opened(old, digest=manifest_digest(seal(KEY, "manifest", manifest())))


def test_another_signer_run_or_kind_is_refused() -> None:
    with pytest.raises(BadSignature, match="not by"):
        opened(seal(Key.make(), "manifest", manifest()))
    with pytest.raises(WeightsError, match="belongs to run 'other'"):
        opened(seal(KEY, "manifest", manifest(run="other")))
    with pytest.raises(BadSignature, match="not a 'manifest'"):
        opened(seal(KEY, "lease", manifest()))
    with pytest.raises(BadSignature, match="does not verify"):
        opened(msgspec.structs.replace(seal(KEY, "manifest", manifest()), signature=bytes(64)))


def test_tensors_must_come_to_the_digest() -> None:
    for tensors in ([tensor("a")], [tensor("b", "22" * 32), tensor("a")], [tensor("a"), tensor("c", "22" * 32)]):
        with pytest.raises(WeightsError, match="do not come to its own digest"):
            opened(seal(KEY, "manifest", manifest(tensors=tensors)))


def test_the_target_digest_is_that_of_the_docs() -> None:
    total = digest_of(b"a\0" + b"\x11" * 32 + b"b\0" + b"\x22" * 32)
    assert manifest().digest == total


def adapted(**changes: object) -> Manifest:
    """Two matrices of 2 × 3 on one base shard, with adapters of rank 4 in a shard each."""
    shards = [Shard(digest="33" * 32, size_bytes=size) for size in (5, 2 * 4 * 5, 2 * 4 * 5)]
    return msgspec.structs.replace(manifest(shards=shards, adapters=[adapter("a", 1), adapter("b", 2)]), **changes)


def adapter(name: str, shard: int, **changes: object) -> Adapter:
    return msgspec.structs.replace(Adapter(name=name, rank=4, exponent=-40, shard=shard), **changes)


def test_adapters_on_a_base_open_and_say_what_travels() -> None:
    made = adapted()
    assert opened(seal(KEY, "manifest", made)) == made
    assert (made.base_shards, made.delta_bytes, made.anchor_bytes) == (1, 80, 0)
    assert [[tensor.name for tensor in held] for held in by_shard(made)] == [["a", "b"]]
    together = adapted(shards=[made.shards[0], Shard(digest="33" * 32, size_bytes=80)], adapters=[
        adapter("a", 1), adapter("b", 1)
    ])  # fmt: skip
    assert opened(seal(KEY, "manifest", together)) == together


OTHER = msgspec.structs.replace(tensor("a"), shape=[2, 3, 1]), msgspec.structs.replace(tensor("b"), dtype="float32")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"adapters": [adapter("a", 1), adapter("c", 2)]}, "does not name"),
        ({"adapters": [adapter("c", 1), adapter("b", 2)]}, "does not name"),
        ({"adapters": [adapter("a", 1), adapter("a", 2)]}, "not in their order"),
        ({"adapters": [adapter("b", 1), adapter("a", 2)]}, "not in their order"),
        ({"adapters": [adapter("a", 1, rank=5), adapter("b", 2)]}, "just the bytes"),
        ({"adapters": [adapter("a", 1, rank=3), adapter("b", 2, rank=4096)]}, "just the bytes"),
        ({"adapters": [adapter("a", 1), adapter("b", 3)]}, "just the bytes"),
        ({"adapters": [adapter("a", 99_999), adapter("b", 99_999)]}, "just the bytes"),
        ({"adapters": [adapter("a", 1)]}, "just the bytes"),
        ({"adapters": [adapter("a", 0), adapter("b", 2)]}, "just the bytes"),
        ({"base_step": 2, "parent": "0" * 64, "deltas": [Shard(digest="44" * 32, size_bytes=1)]}, "both adapters and"),
        ({"tensors": [OTHER[0], tensor("b")]}, "only bfloat16 matrices have adapters"),
        ({"tensors": [tensor("a"), OTHER[1]]}, "only bfloat16 matrices have adapters"),
        ({"tensors": [tensor("a"), msgspec.structs.replace(tensor("b"), shard=1)]}, "in shards that it does not name"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(changes, match) -> None:
    odd = adapted(**changes)
    odd = msgspec.structs.replace(odd, digest=target_digest(odd.tensors))
    with pytest.raises(WeightsError, match=match):
        opened(seal(KEY, "manifest", odd))


@pytest.mark.parametrize(
    "changes", [{"rank": 0}, {"rank": 4097}, {"exponent": -301}, {"exponent": 231}, {"exponent": 0.5}, {"scale": 2.0}]
)
def test_ranks_and_exponents_are_bounded_on_the_wire(changes) -> None:
    tree = msgspec.to_builtins(adapter("a", 1)) | changes
    with pytest.raises(Malformed):
        wire.decode(msgspec.msgpack.encode(tree), Adapter)


def test_a_shard_is_checked_by_size_and_content() -> None:
    digest = digest_of(DATA)
    check_shard(DATA, digest, len(DATA))
    with pytest.raises(WeightsError, match="has 4 bytes, its manifest says 5"):
        check_shard(DATA[:-1], digest, len(DATA))
    with pytest.raises(WeightsError, match="download it from another source"):
        check_shard(b"sharp", digest, len(DATA))


@pytest.mark.parametrize(
    ("header", "size", "expected"),
    [
        ("", 10, (0, 10)),
        ("", 0, (0, 0)),
        ("bytes=0-", 10, (0, 10)),
        ("bytes=4-", 10, (4, 10)),
        ("bytes=4-4", 10, (4, 5)),
        ("bytes=4-99", 10, (4, 10)),
        ("bytes=-4", 10, (0, 10)),
        ("bytes=0-1,2-3", 10, (0, 10)),
        ("items=0-1", 10, (0, 10)),
    ],
)
def test_ranges(header, size, expected) -> None:
    assert byte_range(header, size) == expected


@pytest.mark.parametrize(("header", "size"), [("bytes=10-", 10), ("bytes=5-4", 10), ("bytes=0-", 0), ("bytes=0-0", 0)])
def test_ranges_outside_of_the_blob(header, size) -> None:
    with pytest.raises(OutOfRange, match=f"not within the {size} bytes"):
        byte_range(header, size)
