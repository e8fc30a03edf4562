"""The fingerprint as it is sent, how far two are apart, and what follows: everything that is not a good one fails."""

import hashlib
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from farflung.config import Config
from farflung.coordinator import load_profiles
from farflung.protocol import fingerprint as wire
from farflung.protocol.errors import ConfigError, Malformed
from farflung.protocol.messages import RolloutEvidence, SubmittedRollout
from farflung.trust import fingerprint_distance
from farflung.trust.record import Finding, NodeRecord, Outcome

NONCE, OTHER = "ab" * 32, "cd" * 32
OK = Outcome("ok", 0.1, 1e6, "fine")
GOOD = Finding("r1", 1, 0, (0.0,), 0.01)
FAR = Finding("r2", 1, 0, (0.0,), 0.9, True)


def test_signs_are_the_bits_of_the_hash_in_the_order_that_the_page_tells() -> None:
    made = wire.signs(NONCE, 5)
    word = hashlib.shake_256(bytes.fromhex(NONCE) + bytes([0, 0, 0, 3])).digest(20)
    bits = int.from_bytes(word[8:12], "little")
    assert made.shape == (wire.POSITIONS, 5, wire.NUMBERS)
    assert made[3, 2].tolist() == [1 if bits >> k & 1 else -1 for k in range(32)]


def test_another_nonce_or_position_gives_unrelated_signs() -> None:
    here, there = wire.signs(NONCE, 500, 2), wire.signs(OTHER, 500, 2)
    for one, other in ((here[0], here[1]), (here[0], there[0])):
        assert abs(float((one * other.astype(float)).mean())) < 0.05


def test_a_fingerprint_comes_back_to_half_a_step() -> None:
    sketch = np.random.default_rng(1).normal(size=wire.NUMBERS).astype(np.float32)
    sent = wire.pack(sketch)
    assert len(sent) == wire.NUMBERS
    assert np.abs(wire.unpack(sent) - sketch).max() <= wire.STEP / 2 + 1e-6
    assert fingerprint_distance.distance(sent, sketch) < wire.STEP / 3


def test_numbers_beyond_the_range_are_sent_as_its_end() -> None:
    sent = wire.pack(np.full(wire.NUMBERS, -9.0))
    assert wire.unpack(sent).tolist() == [-127 * wire.STEP] * wire.NUMBERS
    assert fingerprint_distance.distance(sent, np.full(wire.NUMBERS, -9.0, np.float32)) == 0


@pytest.mark.parametrize("sent", [b"", b"\0" * 31, b"\0" * 33, b"\x80" * 32])
def test_what_is_no_fingerprint_is_malformed_and_as_far_as_can_be(sent: bytes) -> None:
    with pytest.raises(Malformed, match="32 bytes"):
        wire.unpack(sent)
    assert fingerprint_distance.distance(sent, np.zeros(wire.NUMBERS, np.float32)) == fingerprint_distance.FARTHEST


def test_zeros_constants_and_those_of_another_lease_are_far() -> None:
    rng = np.random.default_rng(2)
    unit = rng.normal(size=576)
    unit /= np.linalg.norm(unit)
    mine, theirs = (wire.signs(nonce, 576, 1)[0].T @ unit for nonce in (NONCE, OTHER))
    assert fingerprint_distance.distance(wire.pack(mine), mine) < 0.02
    forged = [bytes([value]) * wire.NUMBERS for value in (0, 20, 127, 235)]
    assert all(fingerprint_distance.distance(sent, mine) > 0.6 for sent in (*forged, wire.pack(theirs)))


@pytest.mark.parametrize(("found", "most"), [(0.3, 0.2), (0.0, 0.0), (math.nan, 0.2), (math.inf, 0.2), (-1.0, 0.2)])
def test_too_far_unbounded_and_meaningless_all_fail(found: float, most: float) -> None:
    assert fingerprint_distance.is_far(found, most)


def test_what_is_near_passes() -> None:
    assert not fingerprint_distance.is_far(0.2, 0.2)
    assert fingerprint_distance.bound([0.1, 0.2]) == pytest.approx(0.3)
    assert fingerprint_distance.is_far(0.0, fingerprint_distance.bound([]))


def test_a_verifier_whose_own_activations_are_not_finite_accuses_nobody() -> None:
    with pytest.raises(ValueError, match="verifier"):
        fingerprint_distance.distance(bytes(wire.NUMBERS), np.full(wire.NUMBERS, np.nan, np.float32))


def test_one_far_fingerprint_voids_and_sends_back_to_probation_but_leaves_the_test_alone() -> None:
    record = NodeRecord("trusted", clean_rollouts=99, audited_submissions=3)
    after, outcome = fingerprint_distance.check(record, OK, [GOOD, FAR], 0.2)
    assert (outcome.kind, outcome.statistic, outcome.threshold) == ("void", 0.9, 0.2)
    assert "1 of 2 fingerprints" in outcome.reason
    assert (after.status, after.clean_rollouts, after.bad_submissions) == ("probation", 0, 1)
    assert (after.m, after.audited_submissions) == (record.m, record.audited_submissions)


@pytest.mark.parametrize("kind", ["void", "quarantine", "eject"])
def test_what_the_tokens_condemn_stays_condemned_as_it_was(kind) -> None:
    outcome = Outcome(kind, 1.0, 2.0, "tokens")
    assert fingerprint_distance.check(NodeRecord(), outcome, [FAR], 0.2) == (NodeRecord(), outcome)


def test_good_fingerprints_change_nothing() -> None:
    assert fingerprint_distance.check(NodeRecord(), OK, [GOOD], 0.2) == (NodeRecord(), OK)


@pytest.mark.parametrize("distance", [-0.1, 1e7, math.nan])
def test_a_distance_that_means_nothing_is_no_evidence(distance: float) -> None:
    floats = dict.fromkeys(("gap", "margin", "pick", "lead"), b"")
    sent = msgspec.msgpack.encode({"rollout": "r1", **floats, "distance": distance})
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(sent, type=RolloutEvidence)


def test_without_one_the_body_is_that_of_a_run_that_asks_for_none() -> None:
    assert msgspec.msgpack.encode(SubmittedRollout(rollout="r1", ids=b"")) == msgspec.msgpack.encode(
        {"rollout": "r1", "ids": b""}
    )


def test_a_run_that_asks_for_fingerprints_needs_profiles_that_bound_them(tmp_path) -> None:
    from farflung.trust.evidence import to_json
    from farflung.trust.profiles import load_profile

    blind = msgspec.structs.replace(load_profile("torch-cpu-fp32"), fingerprint=0.0)
    path = tmp_path / "blind.json"
    path.write_bytes(to_json(blind))
    base = Path(__file__).parents[2] / "examples" / "base"
    tree = {"model": {"path": str(base), "profile": str(path)}, "generate": {"max_new_tokens": 32}}
    tree |= {"trust": {"fingerprint": True}}
    with pytest.raises(ConfigError, match="bounds none"):
        load_profiles(Config.model_validate(tree))
    assert load_profiles(Config.model_validate(tree | {"trust": {}})).run.name == blind.name
