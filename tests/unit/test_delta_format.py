"""A delta read as docs/protocol.md describes it, in plain Python: the page and the codec say the same."""

import numpy as np
import pytest
from backports import zstd

from farflung.weights import delta


class Page:
    """Reads the parts that the page names."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def count(self) -> int:
        value, shift = 0, 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def packed(self, size: int) -> bytes:
        said = self.count()
        return zstd.decompress(self.take(said // 2)) if said else self.take(size)

    def bits(self, size: int) -> list[int]:
        said = self.count()
        rare, inverted, sparse = said // 4, said // 2 % 2, said % 2
        if not sparse:
            return [byte >> (7 - k) & 1 for byte in self.packed((size + 7) // 8) for k in range(8)][:size]
        found = [inverted] * size
        for place in self.places(rare):
            found[place] = 1 - inverted
        return found

    def places(self, count: int) -> list[int]:
        place, found = -1, []
        for gap in self.numbers(count) if count else []:
            place += gap + 1
            found.append(place)
        return found

    def numbers(self, count: int) -> list[int]:
        if self.count():
            symbols = [half for byte in self.packed((count + 1) // 2) for half in (byte >> 4, byte & 15)][:count]
        else:
            symbols = list(self.packed(count))
        found = [symbol if symbol < 16 else (8 | symbol & 7) << (symbol // 8 - 1) for symbol in symbols]
        for k in range(1, 30):
            where = [i for i, symbol in enumerate(symbols) if symbol >= 16 and symbol // 8 - 1 == k]
            for start in range(0, len(where), 1 << 18):
                part = where[start : start + (1 << 18)]
                bits = "".join(f"{byte:08b}" for byte in self.take((len(part) * k + 7) // 8))
                for i, place in enumerate(part):
                    found[place] |= int(bits[i * k : (i + 1) * k], 2)
        return found


def newer(page: Page, olds: list[list[int]], width: int) -> list[list[int]]:
    """One section applied to all tensors of its width."""
    values = [value for old in olds for value in old]
    if page.count() == 0:
        data = page.packed(len(values) * width)
        found = [int.from_bytes(data[i : i + width], "little") for i in range(0, len(data), width)]
    else:
        found = classes(page, values, width)
    lengths = iter(found)
    return [[next(lengths) for _ in old] for old in olds]


def classes(page: Page, values: list[int], width: int) -> list[int]:
    top_bit, span = 1 << 8 * width - 1, 1 << 8 * width
    firsts = [0, *(page.count() for _ in range(page.count()))]
    buckets = [value % top_bit >> max(0, 8 * width - 9) for value in values]
    of = [max(c for c, first in enumerate(firsts) if bucket >= first) for bucket in buckets]
    highest = len(firsts) - 1
    changed: dict[int, list[int]] = {}
    for c in range(highest - 1, -1, -1):
        members = [i for i, k in enumerate(of) if k == c]
        assert page.count() == len(members)
        changed[c] = [i for i, bit in zip(members, page.bits(len(members)), strict=True) if bit]
    changed[highest] = page.places(page.count())
    found = list(values)
    for c in range(highest, -1, -1):
        for place, distance in zip(changed[c], page.numbers(len(changed[c])), strict=True):
            step = (distance + 1) // 2 if distance % 2 else -(distance + 2) // 2
            rising = lambda value: value ^ (top_bit - 1) if value >= top_bit else value  # noqa: E731
            found[place] = rising((rising(values[place]) + step) % span)
    return found


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("share", [0.0, 0.004, 0.1, 0.6, 1.0])
def test_the_page_reads_what_the_codec_writes(width: int, share: float) -> None:
    rng = np.random.default_rng(7)
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32}[width]
    olds = [
        ((rng.normal(size=size) * 0.05).astype(np.float32).view(np.uint32) >> 32 - 8 * width).astype(kind)
        for size in (700, 0, 1, 300)
    ]
    small = [(old & ((1 << 8 * width - 1) - 1)) < (0.3 if width == 1 else 0.98) * (kind(-1 % (1 << 8 * width)) >> 1)
             for old in olds]  # fmt: skip
    news = [
        np.where(is_small & (rng.random(old.size) < share), old + rng.choice([1, 2, 40]).astype(kind), old)
        for old, is_small in zip(olds, small, strict=True)
    ]
    page = Page(delta.encode(olds, news))
    assert newer(page, [old.tolist() for old in olds], width) == [new.tolist() for new in news]
    assert page.at == len(page.data)
