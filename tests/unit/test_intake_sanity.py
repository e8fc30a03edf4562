"""Sanity of a submission: what is refused at the door, without a database and without torch."""

import msgspec
import numpy as np
import pytest

from farflung.protocol import wire
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import Malformed, Rejected
from farflung.protocol.messages import Lease, LeaseGroup, Sample, Submission, SubmissionBody, SubmittedRollout
from farflung.protocol.stops import DONE, Stops
from farflung.rollouts.validate import ValidSubmission, inspect

VOCAB, EOS, BUDGET = 100, frozenset({2, 3}), 6
MOVES = np.zeros((2, VOCAB), np.uint8)
MOVES[0, 8], MOVES[1, 8], MOVES[:, 9] = 1, DONE, DONE
STOPS = Stops(MOVES)
"""Two tokens 8 in a row complete a stop string, and so does one 9."""


def lease(*sizes: int) -> Lease:
    names = iter(f"r{number}" for number in range(100))
    groups = [
        LeaseGroup(
            group=f"g{number}",
            prompt_ids=b"\5\0\0\0",
            samples=[Sample(rollout=next(names), index=index, seed=0) for index in range(size)],
        )
        for number, size in enumerate(sizes or (2, 1))
    ]
    return Lease(
        lease="l1",
        run="demo",
        node="n1",
        purpose="train",
        step=0,
        manifest="0" * 64,
        temperature=1.0,
        max_new_tokens=BUDGET,
        nonce="0" * 64,
        probe="0" * 64,
        expires_at=0.0,
        groups=groups,
    )


def submission(rollouts: dict[str, list[int]], **fields: object) -> Submission:
    packed = [SubmittedRollout(rollout=name, ids=wire.pack_ids(ids)) for name, ids in rollouts.items()]
    return Submission(rollouts=packed, **fields)  # type: ignore[arg-type]


def look(rollouts: dict[str, list[int]], **fields: object) -> ValidSubmission:
    return inspect(lease(), "n1", submission(rollouts, **fields), VOCAB, EOS)


GOOD = {"r0": [5, 6, 2], "r1": [3], "r2": [9] * BUDGET}


def test_what_a_good_submission_comes_to() -> None:
    valid = look(GOOD, generate_s=3.0)
    assert valid.tokens == {"r0": 3, "r1": 1, "r2": 6}
    assert (valid.is_partial, valid.logp, valid.digest) == (False, b"", digest_of(valid.body))
    body = msgspec.msgpack.decode(valid.body, type=SubmissionBody)
    assert (body.lease, body.node, [r.rollout for r in body.rollouts]) == ("l1", "n1", ["r0", "r1", "r2"])


def test_the_digest_covers_lease_node_and_tokens_and_no_figures() -> None:
    logp = [wire.pack_floats([-1.0] * len(ids)) for ids in GOOD.values()]
    assert look(GOOD).digest == look(GOOD, generate_s=9.0, logp=logp).digest
    assert look(GOOD).digest != look(GOOD | {"r1": [2]}).digest
    assert look(GOOD).digest != look(dict(reversed(GOOD.items()))).digest
    assert look(GOOD).digest != inspect(lease(), "n2", submission(GOOD), VOCAB, EOS).digest


@pytest.mark.parametrize("ids", [[2], [3], [0, 99, 2], [7] * BUDGET, [7] * (BUDGET - 1) + [2]])
def test_endings_that_are_allowed(ids) -> None:
    assert look(GOOD | {"r0": ids}).tokens["r0"] == len(ids)


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        ([], "has 0 tokens; the lease allows 1 to 6"),
        ([7] * 7, "has 7 tokens; the lease allows 1 to 6"),
        ([7] * 6 + [2], "has 7 tokens"),
        ([100, 2], "has token 100; the vocabulary has 100"),
        ([2**32 - 1, 2], "has token 4294967295"),
        ([2, 2], "goes on after an end token at position 0"),
        ([7, 3, 7, 2], "goes on after an end token at position 1"),
        ([2, 7, 7, 7, 7, 7], "goes on after an end token at position 0"),
        ([7, 7], "stops after 2 of 6 tokens without an end token"),
    ],
)
def test_tokens_that_no_honest_engine_gives(ids, why) -> None:
    with pytest.raises(Rejected, match=why):
        look(GOOD | {"r0": ids})


def test_every_assigned_sample_must_come_once() -> None:
    two = {name: GOOD[name] for name in ("r0", "r1")}
    with pytest.raises(Rejected, match="assigns 3 rollouts, 2 came"):
        look(two)
    assert look(two, partial=True).is_partial
    with pytest.raises(Rejected, match=r"does not assign rollouts \['r9'\]"):
        look(GOOD | {"r9": [2]})
    with pytest.raises(Rejected, match=r"does not assign rollouts \['r9'\]"):
        look({"r9": [2]}, partial=True)
    twice = submission(GOOD)
    twice.rollouts[1] = twice.rollouts[0]
    with pytest.raises(Rejected, match="send each once"):
        inspect(lease(), "n1", twice, VOCAB, EOS)


def test_a_whole_submission_may_call_itself_partial() -> None:
    assert look(GOOD, partial=True).digest == look(GOOD).digest


@pytest.mark.parametrize(
    "logp",
    [
        [b""],
        [b"", b"", b""],
        [wire.pack_floats([0.0] * 3), wire.pack_floats([0.0]), wire.pack_floats([0.0] * 5)],
    ],
)
def test_log_probabilities_must_fit_the_tokens(logp) -> None:
    with pytest.raises(Rejected):
        look(GOOD, logp=logp)


def test_log_probabilities_must_be_finite() -> None:
    odd = [wire.pack_floats([0.0] * 3), wire.pack_floats([float("nan")]), wire.pack_floats([0.0] * 6)]
    with pytest.raises(Malformed, match="finite"):
        look(GOOD, logp=odd)


def test_half_a_token_is_malformed() -> None:
    odd = submission(GOOD)
    odd.rollouts[0] = SubmittedRollout(rollout="r0", ids=b"\1\0\0\0\2")
    with pytest.raises(Malformed, match="no whole number"):
        inspect(lease(), "n1", odd, VOCAB, EOS)


@pytest.mark.parametrize("ids", [[9], [8, 8], [8, 7, 8, 8], [2], [8, 2], [7] * BUDGET, [7] * (BUDGET - 1) + [9]])
def test_endings_that_stop_strings_allow(ids) -> None:
    sent = submission(GOOD | {"r1": ids, "r2": [9]})
    assert inspect(lease(), "n1", sent, VOCAB, EOS, STOPS).tokens["r1"] == len(ids)


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ([9, 5], "goes on after a stop string at position 0"),
        ([8, 8, 2], "goes on after a stop string at position 1"),
        ([2, 9], "goes on after an end token at position 0"),
        ([8, 7], "stops after 2 of 6 tokens without an end"),
        ([9] * BUDGET, "goes on after a stop string at position 0"),
    ],
)
def test_endings_that_stop_strings_refuse(ids, told) -> None:
    sent = submission(GOOD | {"r1": ids, "r2": [9]})
    with pytest.raises(Rejected, match=told):
        inspect(lease(), "n1", sent, VOCAB, EOS, STOPS)
