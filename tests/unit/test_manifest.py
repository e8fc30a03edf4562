"""What makes an untrusted copy of the weights safe to load."""

import hashlib

import msgspec
import pytest

from farflung.protocol.errors import BadSignature, OutOfRange, WeightsError
from farflung.protocol.identity import Key, Signed, seal
from farflung.protocol.messages import Manifest, Shard, Tensor
from farflung.weights.manifest import check_shard, manifest_digest, open_manifest, target_digest
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
        shards=[Shard(digest=hashlib.sha256(DATA).hexdigest(), size_bytes=len(DATA))],
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
    total = hashlib.sha256(b"a\0" + b"\x11" * 32 + b"b\0" + b"\x22" * 32).hexdigest()
    assert manifest().digest == total


def test_a_shard_is_checked_by_size_and_content() -> None:
    digest = hashlib.sha256(DATA).hexdigest()
    check_shard(DATA, digest, len(DATA))
    with pytest.raises(WeightsError, match="has 4 bytes, its manifest says 5"):
        check_shard(DATA[:-1], digest, len(DATA))
    with pytest.raises(WeightsError, match="fetch it from somebody else"):
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
