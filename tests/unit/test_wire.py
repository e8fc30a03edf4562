"""Bytes to messages and back, the same in both encodings, and strict in both."""

import math

import msgspec
import numpy as np
import pytest

from farflung.protocol import messages as m
from farflung.protocol import wire
from farflung.protocol.errors import Malformed
from farflung.protocol.identity import Key, seal

ID, DIGEST = "r0123456789ab", "ab" * 32
LATEST = m.Latest(status="running", step=3, manifest=DIGEST)
LEASE = m.Lease(
    lease="l1",
    run="demo",
    node="n1",
    purpose="train",
    step=3,
    manifest=DIGEST,
    temperature=1.0,
    max_new_tokens=8,
    nonce=DIGEST,
    probe=DIGEST,
    expires_at=1e9,
    groups=[m.LeaseGroup(group="g1", prompt_ids=b"\1\0\0\0", samples=[m.Sample(rollout=ID, index=0, seed=2**53 - 1)])],
)
MESSAGES = [
    m.Empty(),
    m.Register(version=1, name="Ada's? no: ada (box)".replace("'", "").replace("?", "")),
    m.Latest(status="running", step=-1, manifest=""),
    LEASE,
    m.LeaseAnswer(latest=LATEST, lease=seal(Key(b"\1" * 32), "lease", LEASE)),
    m.Submission(rollouts=[m.SubmittedRollout(rollout=ID, ids=b"\2\0\0\0")], logp=[b"\0\0\0\0"]),
    m.Heartbeat(phase="generating", cpu_s=1.5),
    m.ScoreResult(rollout=ID, reward=1.0, parts={"format": 0.5}, answer="=12\n"),
    m.Commit(manifest=seal(Key(b"\1" * 32), "manifest", m.Empty()), metrics={"loss": -0.25}),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("kind", [wire.JSON, wire.MSGPACK, "application/json; charset=utf-8", "Application/MsgPack"])
def test_a_message_survives_both_encodings(message, kind) -> None:
    encoded = wire.encode(message, wire.JSON if "json" in kind else wire.MSGPACK)
    assert wire.decode(encoded, type(message), kind) == message


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-msgpack", "json", "application/json+x"])
def test_other_content_types_are_refused(kind) -> None:
    with pytest.raises(Malformed, match="is not spoken here"):
        wire.decode(b"{}", m.Empty, kind)


def encoders():
    return [(wire.JSON, msgspec.json.encode), (wire.MSGPACK, msgspec.msgpack.encode)]


@pytest.mark.parametrize(
    ("type", "fields"),
    [
        (m.LeaseRequest, {"unknown": 1}),
        (m.LeaseRequest, {"slots": "8"}),
        (m.LeaseRequest, {"slots": 8.5}),
        (m.LeaseRequest, {"slots": 0}),
        (m.LeaseRequest, {"slots": 4097}),
        (m.LeaseRequest, {"slots": None}),
        (m.LeaseRequest, {"wait_s": -1.0}),
        (m.LeaseRequest, {"context": 2**53 + 1}),
        (m.LeaseRequest, {"context": 2**64 - 1}),
        (m.LeaseRequest, {"loaded_step": -2}),
        (m.Register, {}),
        (m.Register, {"version": -1}),
        (m.Register, {"version": True}),
        (m.Register, {"version": 1, "role": "king"}),
        (m.Register, {"version": 1, "name": "a\n"}),
        (m.Register, {"version": 1, "name": "\x1b[2J"}),
        (m.Register, {"version": 1, "name": "<script>"}),
        (m.Register, {"version": 1, "name": "x" * 81}),
        (m.Register, {"version": 1, "invite": "x" * 129}),
        (m.SubmittedRollout, {"rollout": "R1", "ids": ""}),
        (m.SubmittedRollout, {"rollout": "r1\n", "ids": ""}),
        (m.SubmittedRollout, {"rollout": "../r1", "ids": ""}),
        (m.SubmittedRollout, {"rollout": "", "ids": ""}),
        (m.Shard, {"digest": "ab" * 32 + "\n", "size_bytes": 1}),
        (m.Shard, {"digest": "AB" * 32, "size_bytes": 1}),
        (m.File, {"name": "..", "digest": DIGEST, "size_bytes": 1}),
        (m.File, {"name": "a/b", "digest": DIGEST, "size_bytes": 1}),
        (m.ScoreResult, {"rollout": ID, "reward": 1.01}),
        (m.ScoreResult, {"rollout": ID, "reward": -0.01}),
        (m.Scores, {"results": []}),
    ],
)
def test_both_encodings_refuse_the_same(type, fields) -> None:
    for kind, encode in encoders():
        with pytest.raises(Malformed, match=f"no valid {type.__name__}"):
            wire.decode(encode(fields), type, kind)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("type", "field"),
    [
        (m.Heartbeat, "cpu_s"),
        (m.Heartbeat, "work_cpu_s"),
        (m.Heartbeat, "sync_pause_s"),
        (m.Heartbeat, "started_at"),
        (m.LeaseRequest, "wait_s"),
        (m.Claim, "wait_s"),
    ],
)
def test_msgpack_cannot_carry_a_float_that_is_none(type, field, value) -> None:
    with pytest.raises(Malformed):
        wire.decode(msgspec.msgpack.encode({field: value}), type)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rewards_and_their_parts_are_finite(value) -> None:
    for fields in ({"rollout": ID, "reward": value}, {"rollout": ID, "parts": {"format": value}}):
        with pytest.raises(Malformed):
            wire.decode(msgspec.msgpack.encode(fields), m.ScoreResult)


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\xff", b"\x80x", b"\x91" * 100_000, b"\x81\xa4name\xa1\xff", b"\xdf\xff\xff\xff\xff"]
)
def test_broken_msgpack(body) -> None:
    with pytest.raises(Malformed):
        wire.decode(body, m.Register)


@pytest.mark.parametrize("body", [b"", b"{", b"{}x", b"[" * 100_000, b'"', b'{"name": "\\ud800"}', b"\xff\xfe{}"])
def test_broken_json(body) -> None:
    with pytest.raises(Malformed):
        wire.decode(body, m.Register, wire.JSON)


def test_ids_are_little_endian() -> None:
    assert wire.pack_ids([1, 258]) == b"\1\0\0\0\2\1\0\0"
    assert wire.unpack_ids(wire.pack_ids([0, 31, 2**32 - 1])).tolist() == [0, 31, 2**32 - 1]
    assert wire.unpack_ids(b"").tolist() == []
    for size in (1, 2, 3, 5):
        with pytest.raises(Malformed, match="4 bytes each"):
            wire.unpack_ids(b"\0" * size)


def test_floats_are_finite() -> None:
    assert wire.unpack_floats(wire.pack_floats([0.5, -1e30])).tolist() == [0.5, np.float32(-1e30)]
    for odd in (math.nan, math.inf, -math.inf):
        with pytest.raises(Malformed, match="finite"):
            wire.unpack_floats(wire.pack_floats([0.0, odd]))
    with pytest.raises(Malformed, match="4 bytes each"):
        wire.unpack_floats(b"\0" * 3)
