"""Trainer and nodes that patch: whole numbers and bits as few bytes, and back. Pure numpy and zstd.

A number becomes a symbol, its leading four bits and their place, and the bits below as they are:

    0 … 15                     the symbol itself
    1abc · 2^k + low, k >= 1   symbol 8 + 8 k + abc, and k low bits

Symbols go through zstd, whose Huffman stage comes within one or two per cent of their entropy; low bits of numbers
that spread over a range are noise, and stay. Everything that is read is bounded by counts that the reader knows
beforehand, so bytes from a stranger cost no more memory than honest ones. Raises WeightsError.
"""

import numpy as np
from backports import zstd

from farflung.protocol.errors import WeightsError

LEVEL = 1
"""Level 3 finds chance matches in what has none: 4 % more bytes and six times slower."""
WINDOW_LOG = 21
"""Largest window that a reader reserves: 2 MiB."""
PACK_FROM = 32
"""Bytes below which zstd's own header outweighs what it saves."""
RARE = 4
"""Bits of which fewer than one in RARE is set are told by the gaps between those."""
AT_ONCE = 1 << 18
_WRITE = {zstd.CompressionParameter.compression_level: LEVEL, zstd.CompressionParameter.window_log: WINDOW_LOG - 2}
_READ = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG}


class Writer:
    """Bytes to be."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def count(self, value: int) -> None:
        """One non-negative integer, seven bits a byte, the low ones first."""
        out = bytearray()
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        self._parts.append(bytes([*out, value]))

    def raw(self, data: np.ndarray) -> None:
        """Bytes as they are; the reader knows how many."""
        self._parts.append(data.tobytes())

    def packed(self, data: np.ndarray) -> None:
        """Bytes, compressed where that helps; the reader knows how many there are when unpacked."""
        plain = data.tobytes()
        packed = zstd.compress(plain, options=_WRITE) if len(plain) >= PACK_FROM else plain
        is_packed = len(packed) < len(plain)
        self.count(len(packed) << 1 | 1 if is_packed else 0)
        self._parts.append(packed if is_packed else plain)

    def bits(self, bits: np.ndarray) -> None:
        """Booleans; the reader knows how many."""
        ones = int(np.count_nonzero(bits))
        is_inverted = ones > len(bits) // 2
        rare = len(bits) - ones if is_inverted else ones
        is_sparse = rare * RARE < len(bits)
        self.count(rare << 2 | is_inverted << 1 | is_sparse)
        if not is_sparse:
            self.packed(np.packbits(bits))
        else:
            self.places(np.flatnonzero(bits ^ is_inverted))

    def places(self, rising: np.ndarray) -> None:
        """Strictly rising positions; the reader knows how many."""
        if len(rising):
            self.integers(np.diff(rising, prepend=-1) - 1)

    def integers(self, values: np.ndarray) -> None:
        """Integers from 0 to 2^32 - 1; the reader knows how many."""
        symbols = _symbols(values)
        is_small = len(symbols) > 0 and int(symbols.max()) < 16
        self.count(is_small)
        self.packed(_pairs(symbols) if is_small else symbols)
        for bits, index in _with_low_bits(symbols):
            for start in range(0, len(index), AT_ONCE):
                self.raw(_low(values[index[start : start + AT_ONCE]], bits))

    def done(self) -> bytes:
        """All that was written."""
        return b"".join(self._parts)


class Reader:
    """Reads what a Writer wrote, from bytes that anybody may have made."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = memoryview(data), 0

    def count(self, most: int) -> int:
        """An integer of at most `most`."""
        value = shift = 0
        while True:
            byte = self._take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift > 63:
                raise WeightsError("a count in this difference has more than 64 bits")
        if value > most:
            raise WeightsError(f"a count in this difference says {value:,} where at most {most:,} can be")
        return value

    def raw(self, size: int) -> np.ndarray:
        """`size` bytes as they are."""
        return np.frombuffer(self._take(size), np.uint8)

    def packed(self, size: int) -> np.ndarray:
        """Bytes that unpack to exactly `size`."""
        said = self.count(len(self._data) << 1 | 1)
        return np.frombuffer(_unpack(self._take(said >> 1), size), np.uint8) if said & 1 else self.raw(size)

    def bits(self, size: int) -> np.ndarray:
        """`size` booleans."""
        said = self.count(size << 2 | 3)
        rare, is_inverted, is_sparse = said >> 2, bool(said & 2), said & 1
        if not is_sparse:
            return np.unpackbits(self.packed(-(-size // 8)), count=size).view(bool)
        bits = np.full(size, is_inverted)
        bits[self.places(rare, size)] ^= True
        return bits

    def places(self, count: int, size: int) -> np.ndarray:
        """`count` strictly rising positions below `size`."""
        if not count:
            return np.zeros(0, np.int64)
        rising = np.cumsum(self.integers(count).astype(np.int64) + 1) - 1
        if rising[-1] >= size:  # each step is positive and below 2^33, so nothing wraps
            raise WeightsError(f"this difference changes value {rising[-1]:,} of {size:,}")
        return rising

    def integers(self, count: int) -> np.ndarray:
        """`count` integers, uint32."""
        is_small = self.count(1)
        symbols = _unpaired(self.packed(-(-count // 2)), count) if is_small else self.packed(count)
        if count and int(symbols.max()) > _LAST:
            raise WeightsError("this difference has a number beyond 32 bits")
        values = _LEADING.take(symbols)
        for bits, index in _with_low_bits(symbols):
            for start in range(0, len(index), AT_ONCE):
                part = index[start : start + AT_ONCE]
                values[part] |= _lifted(self.raw(-(-len(part) * bits // 8)), bits, len(part))
        return values

    def finish(self) -> None:
        """Nothing may be left over."""
        if self._at != len(self._data):
            raise WeightsError(f"this difference has {len(self._data) - self._at} bytes too many")

    def _take(self, size: int) -> memoryview:
        if size > len(self._data) - self._at:
            raise WeightsError(f"this difference ends {size - len(self._data) + self._at} bytes early")
        self._at += size
        return self._data[self._at - size : self._at]


def _unpack(data: memoryview, size: int) -> bytes:
    unpacker = zstd.ZstdDecompressor(options=_READ)
    try:
        plain = unpacker.decompress(data, max_length=size)
        if len(plain) == size and not unpacker.eof:  # the rest may only be the end of the frame
            plain += unpacker.decompress(b"", max_length=1)
    except (zstd.ZstdError, EOFError, MemoryError) as error:
        raise WeightsError(f"this difference does not unpack: {error}") from error
    if len(plain) != size or not unpacker.eof or unpacker.unused_data:
        raise WeightsError(f"a part of this difference does not unpack to {size:,} bytes")
    return plain


def _symbols(values: np.ndarray) -> np.ndarray:
    if not len(values) or int(values.max()) < len(_SYMBOL):
        return _SYMBOL.take(values)
    exact = np.maximum(values, 8).astype(np.float64).view(np.uint64)
    leading = ((exact >> np.uint64(49)) - np.uint64((1023 + 3) * 8 - 8)).astype(np.uint8)  # 8 + 8 k + abc
    return np.where(values < 16, values, leading).astype(np.uint8)


def _with_low_bits(symbols: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(low bits, where) of all symbols that have some, fewest bits first."""
    if not len(symbols) or int(symbols.max()) < 16:
        return []
    where = np.flatnonzero(symbols >= 16)
    bits = (symbols.take(where) >> 3) - 1
    return [(int(k), where.take(np.flatnonzero(bits == k))) for k in np.flatnonzero(np.bincount(bits))]


def _low(values: np.ndarray, bits: int) -> np.ndarray:
    each = np.unpackbits(values.astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)
    return np.packbits(each[:, 32 - bits :])


def _lifted(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    each = np.zeros((count, 32), np.uint8)
    each[:, 32 - bits :] = np.unpackbits(data, count=count * bits).reshape(count, bits)
    return np.packbits(each, axis=1).reshape(-1).view(">u4").astype(np.uint32)


def _pairs(symbols: np.ndarray) -> np.ndarray:
    """Two symbols below 16 in a byte: Huffman codes lose less on pairs."""
    even = np.append(symbols, np.uint8(0)) if len(symbols) % 2 else symbols
    return even[::2] << np.uint8(4) | even[1::2]


def _unpaired(pairs: np.ndarray, count: int) -> np.ndarray:
    both = np.empty((len(pairs), 2), np.uint8)
    both[:, 0], both[:, 1] = pairs >> np.uint8(4), pairs & np.uint8(15)
    return both.reshape(-1)[:count]


_LAST = 8 + 8 * 28 + 7
_LEADING = np.array(
    [*range(16), *(((symbol & 7) | 8) << ((symbol >> 3) - 1) for symbol in range(16, _LAST + 1))], np.uint32
)
_SYMBOL = (np.searchsorted(_LEADING, np.arange(1 << 16), side="right") - 1).astype(np.uint8)
