"""A shard in pieces: put together in order whatever order they come in, by whoever is there."""

import asyncio
import io
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from farflung.weights import ranges
from farflung.weights.ranges import Ranges, wrong

DATA = bytes(range(251)) * 40
Relay = Callable[[int, int], Awaitable[bytes | None]]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "RANGE_BYTES", 500)
    monkeypatch.setattr(ranges, "OVERDUE_S", 0.02)
    monkeypatch.setattr(ranges, "LOOK_S", 0.002)


def fetched(relays: dict[str, Relay], start: bytes = b"") -> tuple[bool, bytes, Ranges]:
    """Whether all came, what is in the file, and what is known of it."""
    file = io.BytesIO(start)

    async def take(url: str, low: int, high: int) -> list[bytes] | None:
        data = await relays[url](low, high)
        return None if data is None else [data[:200], data[200:]]

    async def scene() -> tuple[bool, Ranges]:
        found = Ranges(file, len(DATA), take, ranges.Pace())
        return await found.fetch(list(relays)), found

    is_whole, found = asyncio.run(scene())
    return is_whole, file.getvalue(), found


def honest(pause_s: float = 0.0) -> Relay:
    async def give(low: int, high: int) -> bytes:
        await asyncio.sleep(pause_s)
        return DATA[low:high]

    return give


async def fails(low: int, high: int) -> None:
    return None


async def hangs(low: int, high: int) -> bytes:
    await asyncio.sleep(60)
    return DATA[low:high]


def test_a_fast_relay_sends_more() -> None:
    is_whole, data, found = fetched({"fast": honest(0.0005), "slow": honest(0.005)})
    assert is_whole
    assert data == DATA
    sent = Counter(found.came_from.values())
    assert sent["fast"] > sent["slow"] > 0


def test_it_goes_on_from_what_is_there() -> None:
    is_whole, data, found = fetched({"a": honest(), "b": honest()}, DATA[:1700])
    assert (is_whole, data) == (True, DATA)
    assert min(found.came_from) == 1700


def test_what_one_relay_fails_another_sends() -> None:
    assert fetched({"a": fails, "b": honest()})[:2] == (True, DATA)


def test_a_piece_that_hangs_is_asked_of_another() -> None:
    is_whole, data, found = fetched({"a": hangs, "b": honest()})
    assert (is_whole, data) == (True, DATA)
    assert found.slow == {"a"}


def test_when_all_fail_a_beginning_stays() -> None:
    given: list[int] = []

    async def breaks(low: int, high: int) -> bytes | None:
        given.append(low)
        return DATA[low:high] if len(given) < 4 else None

    is_whole, data, _ = fetched({"a": breaks})
    assert not is_whole
    assert data == DATA[:1500]


def test_memory_is_bounded_while_the_first_piece_is_late() -> None:
    asked: list[int] = []

    async def never_the_first(low: int, high: int) -> bytes | None:
        asked.append(low)
        await asyncio.sleep(0.3 if low == 0 else 0)
        return None if low == 0 else DATA[low:high]

    assert not fetched({"a": never_the_first, "b": never_the_first})[0]
    assert max(asked) < ranges.AHEAD * 2 * ranges.RANGE_BYTES


def test_whoever_sent_wrong_pieces_is_found() -> None:
    bad = DATA[:600] + b"\0" + DATA[601:]
    came_from = {0: "honest", 500: "liar", 1000: "honest"}
    assert wrong(io.BytesIO(bad), io.BytesIO(DATA), came_from) == {"liar"}
