"""Input that is nearly right: valid messages, and changes to bytes and values that follow from a seed."""

import random
from typing import Any

import msgspec
from msgspec import inspect

from farflung.protocol import messages as m
from farflung.protocol import wire

HEX = "ab" * 32
ODD_BYTES = [b"\x00", b"\xff", b"\x7f\xff\xff\xff", b"\xff" * 8, b"\xdd\xff\xff\xff\xff", b"\x93", b"{", b"[" * 3000]
ODD_BYTES += [b"\x91" * 3000, b"NaN", b"1e999", b"-1", b"\xc0\x80", b"\xed\xa0\x80", b'"\\ud800"', b"\n", b"../"]
ODD_VALUES = [None, True, -1, 0, 2**31, 2**53 + 1, 2**63, 2**64 - 1, -(2**63), 0.5, float("nan"), float("inf"), -1e308]
ODD_VALUES += ["", "a" * 600, "é\n", "\x00", HEX, HEX.upper(), b"", b"\x00" * 31, b"\xff" * 40, [], [[]] * 9, {}]


class Chance:
    """Changes to bytes and values, all of them from one seed."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def spoil(self, data: bytes, other: bytes = b"") -> bytes:
        """One to four changes to bytes; now and then random bytes in their place."""
        if self.random.random() < 0.03:
            return self.random.randbytes(self.random.randrange(200))
        found = bytearray(data)
        for _ in range(self.random.choice((1, 1, 1, 2, 4))):
            self._change(found, other)
        return bytes(found)

    def _change(self, found: bytearray, other: bytes) -> None:
        at = self.random.randrange(len(found) + 1)
        end = min(len(found), at + self.random.choice((1, 1, 2, 4, 8, 64)))
        match self.random.randrange(8):
            case 0:
                found[at:end] = b""
            case 1:
                found[at:at] = found[at:end]
            case 2:
                found[at:end] = self.random.choice(ODD_BYTES)
            case 3:
                found[at:] = other[self.random.randrange(len(other) + 1) :]
            case 4:
                found.insert(at, self.random.randrange(256))
            case _ if at < len(found):
                found[at] ^= 1 << self.random.randrange(8)
            case _:
                found.append(self.random.randrange(256))

    def twist(self, tree: Any) -> Any:
        """A tree of builtin types with one value somewhere in it replaced, removed or doubled."""
        if not isinstance(tree, (list, dict)) or not tree or self.random.random() < 0.1:
            return self.random.choice(ODD_VALUES)
        found = tree.copy()
        key = self.random.choice(range(len(tree)) if isinstance(tree, list) else list(tree))
        what = self.random.randrange(12)
        if what == 0:
            found.pop(key)
        elif what == 1 and isinstance(found, list):
            found.insert(key, found[key])
        elif what == 1:
            found[f"{key}x"] = found[key]
        else:
            found[key] = self.twist(found[key])
        return found

    def encoded(self, tree: Any) -> tuple[bytes, str]:
        """A tree, twisted or its bytes spoiled or both, and the content type that it is in."""
        is_json, how = self.random.random() < 0.5, self.random.randrange(5)
        tree = self.twist(tree) if how >= 2 else tree
        data = msgspec.json.encode(tree) if is_json else msgspec.msgpack.encode(tree)
        return self.spoil(data) if how <= 2 else data, wire.JSON if is_json else wire.MSGPACK

    def packed(self, tree: Any) -> bytes:
        """The same, in msgpack."""
        how = self.random.randrange(5)
        data = msgspec.msgpack.encode(self.twist(tree) if how >= 2 else tree)
        return self.spoil(data) if how <= 2 else data


def example(type: Any) -> Any:
    """One valid value of a wire type, as builtin types."""
    return _sample(inspect.type_info(type))


def _sample(kind: Any) -> Any:
    match kind:
        case inspect.StructType():
            return {field.encode_name: _sample(field.type) for field in kind.fields}
        case inspect.ListType() | inspect.VarTupleType():
            return [_sample(kind.item_type)]
        case inspect.DictType():
            return {_sample(kind.key_type): _sample(kind.value_type)}
        case inspect.LiteralType():
            return kind.values[0]
        case inspect.UnionType():
            return _sample(max(kind.types, key=lambda one: not isinstance(one, inspect.NoneType)))
        case inspect.BytesType():
            return b"\x01" * max(kind.min_length or 0, min(kind.max_length or 8, 8))
        case inspect.StrType():
            pattern = kind.pattern or ""
            return HEX if "64}" in pattern else "http://h:1" if "http" in pattern else "a1"
        case inspect.IntType() | inspect.FloatType():
            return 0 if kind.lt == 1 else kind.ge or 1
        case inspect.BoolType():
            return False
        case _:
            raise TypeError(f"no example of {kind} is known; add one to {__name__}")


def message_types() -> list[type[m.Message]]:
    """Every wire type."""
    return sorted(m.Message.__subclasses__(), key=lambda one: one.__name__)
