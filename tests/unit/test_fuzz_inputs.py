"""The fuzzer's own parts: its examples are valid, its changes follow from the seed, and it sees what it looks for."""

from pathlib import Path

import msgspec
import pytest
from load.decoders import Decoder, crashed, decoders
from load.mutate import Chance, example, message_types

from farflung.protocol import wire
from farflung.protocol.errors import Malformed


@pytest.mark.parametrize("type", message_types(), ids=lambda one: one.__name__)
def test_every_wire_type_has_an_example_that_decodes(type: type) -> None:
    assert isinstance(wire.decode(msgspec.msgpack.encode(example(type)), type), type)
    assert isinstance(wire.decode(msgspec.json.encode(example(type)), type, wire.JSON), type)


def test_the_same_seed_gives_the_same_inputs() -> None:
    first, again, other = ([Chance(seed).spoil(b"abcdef" * 9) for _ in range(1)] for seed in ("1", "1", "2"))
    assert first == again != other


def test_an_error_that_is_not_documented_is_a_crash() -> None:
    def wrong(chance: Chance) -> None:
        raise KeyError("x")

    assert "KeyError" in crashed(Decoder("wrong", wrong, (Malformed,)), Chance("0"))
    assert crashed(Decoder("wrong", wrong, (KeyError,)), Chance("0")) == ""


class Unchanged(Chance):
    """Changes nothing."""

    def spoil(self, data: bytes, other: bytes = b"") -> bytes:
        return data

    def twist(self, tree: object) -> object:
        return tree


def test_decoders_take_what_is_right_and_survive_the_rest(tmp_path: Path) -> None:
    for decoder in decoders(tmp_path):
        decoder.attempt(Unchanged("0"))
        chance, refused = Chance(f"0 {decoder.name}"), 0
        for _ in range(60):
            assert crashed(decoder, chance) == ""
            try:
                decoder.attempt(chance)
            except decoder.raises:
                refused += 1
        assert refused or decoder.name == "range header", decoder.name  # one that is odd counts as none
