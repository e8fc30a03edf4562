"""Derivations: vectors that any other implementation must meet, and separation of labels and parts."""

import hashlib
import hmac
from itertools import pairwise

import pytest

from farflung.protocol import seeds
from farflung.protocol.errors import ConfigError

RUN = bytes(range(32))
STEP = seeds.step_secret(RUN, 7)


def test_vectors() -> None:
    assert STEP.hex() == "1982e3deb451695685660c46329efa33595dc31ec743efb6340fc905f553ddef"
    assert seeds.commitment(STEP).hex() == "016609fde870c4a55f4ebe28c5df1f6d9f99cfe36440df375b20cb8c6005af59"
    assert seeds.sample_seed(STEP, "task-1", 3) == 8369429441646370278 >> 11
    assert seeds.audit_key(STEP).hex() == "29b9f85c4300e564f8cc26f6648de3e411af054751f565c5d0ed9bb9375680e7"
    assert seeds.task_key(STEP).hex() == "ffacc9c0d72784f9acc41bd28bf3dda9603674c9a6488a7ab90827cb05bf31fc"


def test_the_vectors_follow_from_the_documented_formula() -> None:
    def e(part: bytes) -> bytes:
        return len(part).to_bytes(4, "big") + part

    step = hmac.new(RUN, e(b"farflung step secret") + e((7).to_bytes(8, "big")), hashlib.sha256).digest()
    message = e(b"farflung sample seed") + e(b"task-1") + e((3).to_bytes(8, "big"))
    assert step == STEP
    assert hmac.new(step, message, hashlib.sha256).digest()[:8] == (8369429441646370278).to_bytes(8, "big")
    assert hashlib.sha256(e(b"farflung commitment") + e(step)).digest() == seeds.commitment(step)


def test_the_encoding_is_injective() -> None:
    lists = [("ab", "c"), ("a", "bc"), ("abc",), ("", "abc"), ("abc", ""), ("", "", "abc"), ()]
    assert len({seeds.encode(*parts) for parts in lists}) == len(lists)


def test_every_purpose_task_sample_and_step_has_its_own() -> None:
    keys = {STEP, seeds.task_key(STEP), seeds.audit_key(STEP), seeds.commitment(STEP), seeds.step_secret(RUN, 8)}
    assert len(keys) == 5
    found = {seeds.sample_seed(STEP, f"t{task}", sample) for task in range(50) for sample in range(50)}
    assert len(found) == 2500


def test_seeds_fill_53_bits() -> None:
    found = [seeds.sample_seed(STEP, "t", sample) for sample in range(200)]
    assert 0 <= min(found) < 2**49
    assert 2**52 < max(found) < 2**53
    assert sum((a ^ b).bit_count() for a, b in pairwise(found)) / 199 == pytest.approx(26.5, abs=1.5)


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_secret_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ConfigError, match=f"a secret has 32 bytes, this one {length}"):
        seeds.step_secret(bytes(length), 0)


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(OverflowError):
        seeds.step_secret(RUN, -1)
