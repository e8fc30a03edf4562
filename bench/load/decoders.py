"""Decoders of strangers' input, fed with nearly right input, and the errors that each may raise. For bench/fuzz.py."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import save

from farflung.audits import verdict
from farflung.net.session import PURPOSES, check_run, delegate
from farflung.protocol import messages as m
from farflung.protocol import wire
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import BadSignature, ConfigError, Malformed, OutOfRange, Rejected, WeightsError
from farflung.protocol.identity import Key, Signed, seal, sign_request, unseal, verify_request
from farflung.protocol.numerics import NOISE
from farflung.rollouts import validate
from farflung.tasks import keyring
from farflung.trust.diagnose import diagnose
from farflung.trust.evidence import Profile
from farflung.trust.profiles import load_profile
from farflung.weights import delta
from farflung.weights.manifest import KIND, by_shard, check_follows, manifest_digest, open_manifest, target_digest
from farflung.weights.origin import byte_range
from farflung.weights.patch import stored
from load.mutate import HEX, Chance, example, message_types

VOCAB = 100
KEY = Key(hashlib.sha256(b"fuzz").digest())


# --- what decodes what others send -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoder:
    """Something that takes bytes from others, and the errors that it documents."""

    name: str
    attempt: Callable[[Chance], object]
    raises: tuple[type[Exception], ...]
    weight: float = 1.0
    """Its share of the inputs, in comparison."""


def decoders(folder: Path) -> list[Decoder]:
    """All of them; `folder` is for those that read files."""
    return [
        *(_of_type(one) for one in (*message_types(), Signed)),
        Decoder("token ids", lambda c: wire.unpack_ids(c.spoil(b"\x01" * 8)), (Malformed,)),
        Decoder("floats", lambda c: wire.unpack_floats(c.spoil(wire.pack_floats([0.5, -1.0]))), (Malformed,)),
        Decoder("range header", lambda c: byte_range(_text(c, "bytes=5-17"), 40), (OutOfRange,)),
        Decoder("signed request", _signed_request, (BadSignature,), 3.0),
        Decoder("sealed evidence", _sealed_evidence, (BadSignature,), 4.0),
        Decoder("evidence", _evidence(load_profile("torch-cpu-fp32")), (Malformed,), 4.0),
        Decoder("submission", _submission(), (Malformed, Rejected), 5.0),
        Decoder("run descriptor", _descriptor(), (Malformed, BadSignature, ConfigError), 2.0),
        Decoder("manifest", _manifest, (BadSignature, WeightsError), 4.0),
        Decoder("difference", _difference(), (WeightsError,), 10.0),
        Decoder("shard", _shard(folder), (WeightsError,), 0.5),
        Decoder("adapters", _adapters(folder), (BadSignature, WeightsError), 2.0),
        Decoder("keyring", _keyring(folder), (ConfigError, BadSignature), 0.5),
        Decoder("profile", _profile(folder), (ConfigError,), 0.5),
    ]


def _of_type(type: type[Any]) -> Decoder:
    tree = example(type)

    def attempt(chance: Chance) -> object:
        data, content_type = chance.encoded(tree)
        return wire.decode(data, type, content_type)

    return Decoder(type.__name__, attempt, (Malformed,))


def _text(chance: Chance, text: str) -> str:
    return chance.spoil(text.encode()).decode("latin-1")


def _signed_request(chance: Chance) -> object:
    headers = sign_request(KEY, "POST", "/v1", "", b"", now=1e9, tag="tag")
    name = chance.random.choice(list(headers))
    headers[name] = _text(chance, headers[name])
    return verify_request(headers, "POST", "/v1", "", now=1e9, tag="tag")


def _resealed(kind: str, payload: bytes) -> Signed:
    """What a key that is trusted, but not its owner, could sign."""
    signed = seal(KEY, kind, m.Empty())
    return msgspec.structs.replace(
        signed, payload=payload, signature=KEY.sign(b"farflung\0" + kind.encode() + b"\0" + payload)
    )


def _sealed_evidence(chance: Chance) -> object:
    return unseal(_resealed(verdict.KIND, chance.packed(EVIDENCE)), verdict.KIND, m.Evidence)


EVIDENCE = example(m.Evidence)


def _evidence(profile: Profile) -> Callable[[Chance], object]:
    """Well-formed evidence with odd numbers: what it comes to, and what explains it."""
    values = {"gap": 1.0, "margin": 0.0, "pick": 0.5, "lead": -1.0}
    honest = {name: np.full(12, value, "<f4").tobytes() for name, value in values.items()}

    def attempt(chance: Chance) -> object:
        arrays = honest.copy()
        for name in arrays:
            arrays[name] = chance.spoil(arrays[name]) if chance.random.random() < 0.5 else arrays[name]
        found = m.RolloutEvidence(rollout="r1", **arrays)
        verdict.finding(profile, found)
        seen = verdict.seen_of(found)
        return diagnose(profile, [seen], {"int8": [seen]})

    return attempt


def _submission() -> Callable[[Chance], object]:
    samples = [m.Sample(rollout=f"r{n}", index=n, seed=n) for n in range(3)]
    groups = [m.LeaseGroup(group="g1", prompt_ids=b"", samples=samples)]
    tree = example(m.Lease) | {"max_new_tokens": 6, "groups": msgspec.to_builtins(groups, builtin_types=(bytes,))}
    lease = msgspec.convert(tree, m.Lease)
    ids = [wire.pack_ids([5, 6, 7, 2]), wire.pack_ids([5] * 6), wire.pack_ids([2])]
    rollouts = [{"rollout": f"r{n}", "ids": one} for n, one in enumerate(ids)]
    honest = {"rollouts": rollouts, "logp": [b"\0" * len(one) for one in ids], "partial": False}

    def attempt(chance: Chance) -> object:
        submission = wire.decode(chance.packed(honest), m.Submission)
        return validate.inspect(lease, "n1", submission, VOCAB, frozenset({2}))

    return attempt


def _descriptor() -> Callable[[Chance], object]:
    delegations = [delegate(KEY, "a1", purpose, KEY.public, time.time() + 1e6) for purpose in PURPOSES]
    info = example(m.RunInfo) | {"noise": NOISE}
    honest = m.Run(root=KEY.public, delegations=delegations, info=_resealed("run", msgspec.msgpack.encode(info)))

    def attempt(chance: Chance) -> object:
        found = msgspec.structs.replace(honest, info=_resealed("run", chance.packed(info)))
        if chance.random.random() < 0.3:
            tree = msgspec.to_builtins(honest, builtin_types=(bytes,))
            found = wire.decode(chance.packed(tree), m.Run)
        return check_run(found, "a1", KEY.public)

    return attempt


def _manifest_tree(**changes: Any) -> dict[str, Any]:
    tensors = [m.Tensor(name="w", dtype="float32", shape=[2, 3], digest=HEX, shard=0)]
    built = msgspec.to_builtins(tensors, builtin_types=(bytes,))
    sums = {"tensors": built, "digest": target_digest(tensors)}
    tree = example(m.Manifest) | {"step": 1, "base_step": 0, "adapters": []} | sums
    return tree | changes


TREE = _manifest_tree()
PARENT = msgspec.convert(_manifest_tree(step=0, base_step=0, parent="", deltas=[]), m.Manifest)


def _manifest(chance: Chance) -> object:
    signed = _resealed(KIND, chance.packed(TREE))
    manifest = open_manifest(signed, KEY.public, "a1", manifest_digest(signed))
    check_follows(manifest, PARENT)
    return by_shard(manifest), manifest.full_bytes, manifest.delta_bytes


def _difference() -> Callable[[Chance], object]:
    rng = np.random.default_rng(0)
    olds = [
        rng.integers(0, 250, 900).astype(kind) << shift
        for kind, shift in ((np.uint8, 0), (np.uint16, 7), (np.uint32, 22))
    ]
    news = [[old + (rng.random(old.size) < share).astype(old.dtype) for old in olds] for share in (0.02, 0.3, 1.0)]
    data = [delta.encode(olds, new) for new in news]
    sizes = [(old.size, old.itemsize) for old in olds]

    def attempt(chance: Chance) -> object:
        return list(delta.decode(chance.spoil(*chance.random.sample(data, 2)), olds, sizes))

    return attempt


def _shard(folder: Path) -> Callable[[Chance], object]:
    good = save({"w": np.ones((2, 3), np.float32)})
    file = folder / "shard"

    def attempt(chance: Chance) -> object:
        data = chance.spoil(good)
        file.write_bytes(data)
        shards = [m.Shard(digest=digest_of(data), size_bytes=len(data))]
        manifest = msgspec.structs.replace(PARENT, shards=shards)
        return list(stored("0", manifest, lambda digest: folder / "none", lambda digest: file))

    return attempt


def _adapters(folder: Path) -> Callable[[Chance], object]:
    """A manifest with adapters, odd but sealed, and a shard of them that has the digest it names."""
    base, held = save({"w": np.ones((4, 3), np.float16)}), bytes(2 * 2 * (4 + 3))
    tensors = [m.Tensor(name="w", dtype="bfloat16", shape=[4, 3], digest=HEX, shard=0)]
    honest = msgspec.structs.replace(
        PARENT,
        tensors=tensors,
        digest=target_digest(tensors),
        adapters=[m.Adapter(name="w", rank=2, exponent=-40, shard=1)],
        shards=[m.Shard(digest=digest_of(data), size_bytes=len(data)) for data in (base, held)],
    )

    def attempt(chance: Chance) -> object:
        signed = _resealed(KIND, chance.packed(msgspec.to_builtins(honest)))
        manifest = open_manifest(signed, KEY.public, "a1", manifest_digest(signed))
        for shard, data in zip(honest.shards, (base, held), strict=True):
            (folder / shard.digest).write_bytes(data)
        return list(stored("0", manifest, lambda digest: folder / "none", lambda digest: folder / digest))

    return attempt


def _keyring(folder: Path) -> Callable[[Chance], object]:
    keyring.write(folder, KEY.public, [delegate(KEY, "a1", purpose, KEY.public, 2e9) for purpose in PURPOSES])
    good = (folder / "delegations.json").read_bytes()

    def attempt(chance: Chance) -> object:
        tree = msgspec.json.decode(good)
        data = msgspec.json.encode(chance.twist(tree)) if chance.random.random() < 0.5 else chance.spoil(good)
        if chance.random.random() < 0.3:
            tree[0] = msgspec.to_builtins(_resealed("delegation", chance.packed(example(m.Delegation))))
            data = msgspec.json.encode(tree)
        (folder / "delegations.json").write_bytes(data)
        ring = keyring.read(folder)
        return ring and ring.live("a1", "weights", 0.0)

    return attempt


def _profile(folder: Path) -> Callable[[Chance], object]:
    good = msgspec.json.encode(load_profile("torch-cpu-fp32"))
    file = folder / "profile.json"

    def attempt(chance: Chance) -> object:
        how = chance.random.random() < 0.5
        file.write_bytes(msgspec.json.encode(chance.twist(msgspec.json.decode(good))) if how else chance.spoil(good))
        return load_profile(str(file))

    return attempt


def crashed(decoder: Decoder, chance: Chance) -> str:
    """Try one input; what was raised that is not documented, empty for nothing."""
    try:
        decoder.attempt(chance)
    except decoder.raises:
        return ""
    except Exception as error:  # noqa: BLE001 - anything else is what is looked for
        return f"{decoder.name}: {type(error).__name__}: {str(error)[:120]}"
    return ""
