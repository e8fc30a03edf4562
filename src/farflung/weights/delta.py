"""Trainer: the difference between two versions of a shard. Nodes: the newer from the older. Lossless, pure.

A value of w bytes is taken as an integer that rises with the number it stands for: its bits, or, where the sign bit is
set, its bits with all others inverted. NaNs and both zeros are integers like any other.

Whether a value changes depends above all on how large it was: an optimizer's step is about as long everywhere, and
it moves the last place of small numbers. So the values of a shard are told apart by magnitude, in at most 256
buckets, and neighbouring buckets whose shares of changed values are alike make a class. Of each class there is one bit
per value, changed or not, and one number per changed value, the signed difference less one; of the topmost class,
which may be most of the shard and hardly changes, the places of the changed values only.

    shard      one section for each width that occurs, narrowest first
    section    method 0 (stored)   the newer bytes of all tensors of this width, packed
               method 1 (classes)  how many, first buckets, bits of each but the top, places of the top, numbers of each
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from farflung.protocol.errors import WeightsError
from farflung.weights.codec import RARE, Reader, Writer

BLOCK = 1 << 20
"""Values looked at together: more leave the processor's cache, fewer make threads wait for each other."""
BUCKETS = 256
CLASS_BITS = 300.0
"""The cost of one more class, about: its Huffman tables and counts."""
LOOK_BITS = 0.4
"""The worth of not looking at a value once more: 6 % of size for a third of the time."""
STORED, CLASSES = 0, 1
RUN, SAMPLED = 1 << 16, 1 << 12
"""Classes are chosen by a look at a sixteenth of the values."""
_NONE = np.zeros(0, np.int64)
_INTS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def encode(olds: Sequence[np.ndarray], news: Sequence[np.ndarray]) -> bytes:
    """The difference of a shard's tensors, each given as a flat array of uint8, uint16 or uint32, old and new alike."""
    writer = Writer()
    for width in _widths(olds):
        pairs = [(old, new) for old, new in zip(olds, news, strict=True) if old.itemsize == width]
        classes, stored = Writer(), Writer()
        classes.count(CLASSES)
        _write_classes(classes, pairs)
        best = classes.done()
        if 2 * len(best) > sum(old.nbytes for old, _ in pairs):
            stored.count(STORED)
            stored.packed(np.concatenate([new for _, new in pairs]).view(np.uint8))
            best = min(best, stored.done(), key=len)
        writer.raw(np.frombuffer(best, np.uint8))
    return writer.done()


def decode(data: bytes, olds: Iterable[np.ndarray], sizes: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
    """The newer tensors one by one, from the older ones, which are only read and may come one by one too.

    `sizes` are (values, width) of every tensor. Raises WeightsError for whatever `encode` would not have written, but
    bytes that were changed on the way may also come to other values: check what comes out against its digest.
    """
    reader = Reader(data)
    sections = {
        width: _section(reader, width, sum(count for count, w in sizes if w == width))
        for width in sorted({width for _, width in sizes})
    }
    reader.finish()
    for old, (count, width) in zip(olds, sizes, strict=True):
        if old.size != count or old.itemsize != width:
            raise WeightsError(f"the base has {old.size} values of {old.itemsize} bytes, not {count} of {width}")
        yield sections[width].newer(old)
    for section in sections.values():
        section.finish()


def as_ints(data: bytes | memoryview | np.ndarray, width: int) -> np.ndarray:
    """Little-endian bytes of values of 1, 2 or 4 bytes as unsigned integers, without a copy."""
    return np.frombuffer(data, np.dtype(_INTS[width]).newbyteorder("<"))


def _widths(arrays: Sequence[np.ndarray]) -> list[int]:
    return sorted({array.itemsize for array in arrays})


# --- values ----------------------------------------------------------------------------------------------------------


def _rising(bits: np.ndarray) -> np.ndarray:
    """Integers that rise with the numbers they stand for; the same function leads back."""
    signed = bits.view(f"i{bits.itemsize}")
    top = 8 * bits.itemsize - 1
    return (signed ^ ((signed >> top) & ((1 << top) - 1))).view(bits.dtype)


def _distance(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Signed differences of changed values as 0, 1, 2 … for -1, +1, -2 …; uint32."""
    step = (_rising(new) - _rising(old)).view(f"i{old.itemsize}")
    return ((step << 1) ^ (step >> (8 * old.itemsize - 1))).view(old.dtype).astype(np.uint32) - np.uint32(1)


def _moved(old: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The new values at these distances from the old ones. Raises WeightsError."""
    if len(distance) and int(distance.max()) >= (1 << 8 * old.itemsize) - 1:
        raise WeightsError(f"this difference moves a value further than {old.itemsize} bytes reach")
    folded = (distance + np.uint32(1)).astype(old.dtype)
    step = (folded >> 1) ^ np.negative(folded & 1)
    return _rising(_rising(old) + step)


def _where(mask: np.ndarray) -> np.ndarray:
    """Indices of what is true."""
    return mask.nonzero()[0]


def _magnitude(bits: np.ndarray) -> np.ndarray:
    return bits & bits.dtype.type((1 << 8 * bits.itemsize - 1) - 1)


def _shift(width: int) -> int:
    """Bits of a magnitude below its bucket: the exponent of bf16 and fp32, more than that of narrower types."""
    return max(0, 8 * width - 1 - 8)


def _blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    for start in range(0, arrays[0].size, BLOCK):
        yield tuple(array[start : start + BLOCK] for array in arrays)


# --- classes ---------------------------------------------------------------------------------------------------------


def _peel(magnitude: np.ndarray, edges: Sequence[int]) -> Iterator[np.ndarray]:
    """Where the values of each class are, from the last edge down to 0; those beyond the last edge are left out.

    `edges` are the magnitudes at which the classes end, rising. The cost falls off from class to class.
    """
    if not edges:
        return
    where = _where(magnitude < edges[-1])
    left = magnitude.take(where)
    for edge in reversed(edges[:-1]):
        is_below = left < edge
        yield where.compress(~is_below)
        below = _where(is_below)
        where, left = where.take(below), left.take(below)
    yield where


def choose_classes(values: np.ndarray, changed: np.ndarray) -> list[int]:
    """First buckets of all classes but the lowest, by merging neighbours as long as that saves bits.

    `values` and `changed` count per bucket. The class from the last of them on is the topmost; it is empty where even
    there many values change.
    """
    firsts = _where(values > 0)
    values, changed = values[firsts], changed[firsts]
    while len(firsts) > 1:
        apart = _bits(values, changed)
        together = _bits(values[:-1] + values[1:], changed[:-1] + changed[1:])
        gains = CLASS_BITS + LOOK_BITS * np.cumsum(values)[:-1] + apart[:-1] + apart[1:] - together
        best = int(np.argmax(gains))
        if gains[best] < 0:
            break
        starts = np.delete(np.arange(len(firsts)), best + 1)
        firsts, values, changed = firsts[starts], np.add.reduceat(values, starts), np.add.reduceat(changed, starts)
    if len(firsts) and changed[-1] * RARE > values[-1]:
        return [*firsts[1:].tolist(), BUCKETS]
    return firsts[1:].tolist()


def _bits(values: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """Entropy of which of these values changed."""
    share = np.clip(changed / values, 1e-12, 1 - 1e-12)
    return -values * (share * np.log2(share) + (1 - share) * np.log2(1 - share))


def _write_classes(writer: Writer, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    width = pairs[0][0].itemsize
    firsts = choose_classes(*_sampled(pairs))
    writer.count(len(firsts))
    for first in firsts:
        writer.count(first)
    edges = [first << _shift(width) for first in firsts]
    found = [_compare(old, new, edges) for pair in pairs for old, new in _blocks(*pair)]
    for parts in zip(*(one.flags for one in found), strict=True):
        bits = np.concatenate(parts)
        writer.count(len(bits))
        writer.bits(bits)
    starts = np.cumsum([0, *(one.size for one in found)])
    places = np.concatenate([one.top + start for one, start in zip(found, starts, strict=False)] or [_NONE])
    writer.count(len(places))
    writer.places(places)
    for parts in zip(*(one.distances for one in found), strict=True):
        writer.integers(np.concatenate(parts))


def _sampled(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """About how many values each bucket has, and how many of them change."""
    shift, totals = _shift(pairs[0][0].itemsize), np.zeros((2, BUCKETS))
    for old, new in pairs:
        before, after = _sample(old), _sample(new)
        buckets, scale = _magnitude(before) >> shift, old.size / max(before.size, 1)
        totals[0] += scale * np.bincount(buckets, minlength=BUCKETS)
        totals[1] += scale * np.bincount(buckets.compress(before != after), minlength=BUCKETS)
    return totals[0], totals[1]


def _sample(array: np.ndarray) -> np.ndarray:
    """The first SAMPLED of every RUN values; of small tensors all."""
    if array.size < RUN:
        return array
    return array[: array.size // RUN * RUN].reshape(-1, RUN)[:, :SAMPLED].reshape(-1)


@dataclass(frozen=True, slots=True)
class _Changes:
    """The changes of one block."""

    size: int
    flags: list[np.ndarray]
    """Per class, topmost but one first: which of its values change."""
    top: np.ndarray
    """Where values of the topmost class change."""
    distances: list[np.ndarray]
    """Per class, topmost first: how far its changed values go."""


def _compare(old: np.ndarray, new: np.ndarray, edges: Sequence[int]) -> _Changes:
    is_changed, magnitude = old != new, _magnitude(old)
    classes = list(_peel(magnitude, edges))
    flags = [is_changed.take(where) for where in classes]
    places = [where.compress(bits) for where, bits in zip(classes, flags, strict=True)]
    top = _NONE
    if np.count_nonzero(is_changed) > sum(map(len, places)):
        top = _where(is_changed)
        top = top.compress(magnitude.take(top) >= edges[-1]) if edges else top
    where = np.concatenate([top, *places])
    ends = np.cumsum([len(top), *map(len, places)])[:-1]
    return _Changes(old.size, flags, top, np.split(_distance(old.take(where), new.take(where)), ends))


# --- reading ---------------------------------------------------------------------------------------------------------


def _section(reader: Reader, width: int, size: int) -> "_Stored | _Classes":
    if reader.count(CLASSES) == STORED:
        return _Stored(as_ints(reader.packed(size * width), width))
    return _Classes(reader, width, size)


class _Stored:
    """The newer values themselves."""

    def __init__(self, values: np.ndarray) -> None:
        self._values, self._at = values, 0

    def newer(self, old: np.ndarray) -> np.ndarray:
        self._at += old.size
        return self._values[self._at - old.size : self._at]

    def finish(self) -> None:
        """Sizes were checked as it was read."""


class _Classes:
    """Bits, places and distances of each class, topmost first, consumed tensor by tensor."""

    def __init__(self, reader: Reader, width: int, size: int) -> None:
        firsts = [reader.count(BUCKETS) for _ in range(reader.count(BUCKETS))]
        if firsts != sorted(set(firsts)):
            raise WeightsError(f"the classes of this difference do not rise: {firsts}")
        self._edges = [first << _shift(width) for first in firsts]
        self._flags = [_Feed(bits) for bits in _read_flags(reader, len(firsts), size)]
        self._places = reader.places(reader.count(size), size)
        counts = [len(self._places), *(int(np.count_nonzero(feed.values)) for feed in self._flags)]
        self._distances = [_Feed(reader.integers(count)) for count in counts]
        self._at = 0

    def newer(self, old: np.ndarray) -> np.ndarray:
        """The next tensor."""
        new = old.copy()
        for before, after in _blocks(old, new):
            changed = list(self._changed(before))
            distances = [feed.next(len(where)) for where, feed in zip(changed, self._distances, strict=True)]
            where = np.concatenate(changed)
            after[where] = _moved(before.take(where), np.concatenate(distances))
            self._at += before.size
        return new

    def finish(self) -> None:
        """Nothing may be left over."""
        if any(feed.left for feed in (*self._flags, *self._distances)):
            raise WeightsError("this difference has classes of another size than its base")

    def _changed(self, old: np.ndarray) -> Iterator[np.ndarray]:
        """Where values of a block change, class by class."""
        low, high = np.searchsorted(self._places, (self._at, self._at + old.size))
        yield self._places[low:high] - self._at
        for where, feed in zip(_peel(_magnitude(old), self._edges), self._flags, strict=True):
            yield where.compress(feed.next(len(where)))


class _Feed:
    """Values that are taken in order."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self._at = values, 0

    @property
    def left(self) -> int:
        """Values not taken yet."""
        return len(self.values) - self._at

    def next(self, count: int) -> np.ndarray:
        """The next `count`. Raises WeightsError."""
        if count > self.left:
            raise WeightsError("this difference has classes of another size than its base")
        self._at += count
        return self.values[self._at - count : self._at]


def _read_flags(reader: Reader, classes: int, size: int) -> Iterator[np.ndarray]:
    """Bits of each class; all of them together are at most one per value."""
    for _ in range(classes):
        count = reader.count(size)
        size -= count
        yield reader.bits(count)
