"""The codec of differences: how small, how bounded, and what its integers are."""

import numpy as np
import pytest

from farflung.protocol.errors import WeightsError
from farflung.weights import codec, delta


def step(seed: int = 0, size: int = 400_000, lr: float = 1e-5) -> tuple[np.ndarray, np.ndarray]:
    """bf16 weights before and after a step of about `lr` everywhere."""
    rng = np.random.default_rng(seed)
    masters = (rng.normal(size=size) * 0.05).astype(np.float32)
    moved = masters + (lr * rng.choice([-1.0, 1.0], size)).astype(np.float32)
    return tuple((one.view(np.uint32) >> 16).astype(np.uint16) for one in (masters, moved))


def floor_bytes(old: np.ndarray, new: np.ndarray) -> float:
    """Entropy of which values change plus that of their differences, taken each on its own."""
    is_changed = old != new
    share = is_changed.mean()
    mask = -old.size * (share * np.log2(share) + (1 - share) * np.log2(1 - share))
    _, counts = np.unique(new[is_changed].astype(int) - old[is_changed], return_counts=True)
    return (mask - (counts * np.log2(counts / counts.sum())).sum()) / 8


def test_magnitude_tells_what_changes_so_the_result_is_below_the_floor_of_places_and_values_alone() -> None:
    old, new = step()
    size = len(delta.encode([old], [new]))
    assert size < 0.9 * floor_bytes(old, new)
    assert size < old.nbytes / 20


def test_nothing_changed_is_a_few_bytes() -> None:
    old, _ = step()
    assert len(delta.encode([old] * 3, [old] * 3)) < 32


def test_what_has_nothing_in_common_is_stored() -> None:
    rng = np.random.default_rng(1)
    old, new = (rng.integers(0, 2**16, 100_000).astype(np.uint16) for _ in range(2))
    data = delta.encode([old], [new])
    assert len(data) < old.nbytes + 100
    assert next(delta.decode(data, [old], [(old.size, 2)])).tobytes() == new.tobytes()


def test_a_short_message_cannot_claim_many_values() -> None:
    """A bomb: zeros packed 50,000 to 1, for a tensor that is small."""
    writer = codec.Writer()
    writer.count(delta.STORED)
    writer.packed(np.zeros(1 << 26, np.uint8))
    with pytest.raises(WeightsError, match="does not unpack to 200 bytes"):
        next(delta.decode(writer.done(), [np.zeros(100, np.uint16)], [(100, 2)]))


@pytest.mark.parametrize(("count", "width"), [(9, 2), (10, 4)])
def test_a_base_of_another_size_is_refused(count: int, width: int) -> None:
    old = np.zeros(10, np.uint16)
    data = delta.encode([old], [old + np.uint16(1)])
    with pytest.raises(WeightsError):
        list(delta.decode(data, [old], [(count, width)]))


def test_a_place_beyond_the_tensor_is_refused() -> None:
    writer = codec.Writer()
    for count in (delta.CLASSES, 0, 1):
        writer.count(count)
    writer.places(np.array([10]))
    writer.integers(np.array([0]))
    with pytest.raises(WeightsError, match="changes value 10 of 10"):
        next(delta.decode(writer.done(), [np.zeros(10, np.uint16)], [(10, 2)]))


def test_classes_part_magnitudes_that_change_from_those_that_do_not() -> None:
    values, changed = np.zeros(256), np.zeros(256)
    values[100:110], changed[100:103] = 10_000.0, 9_000.0
    assert delta.choose_classes(values, changed) == [103]


def test_integers_rise_with_the_numbers_they_stand_for() -> None:
    numbers_in_order = np.array([-np.inf, -1.5, -1e-40, -0.0, 0.0, 1e-40, 1.5, np.inf], np.float32)
    rising = delta._rising(numbers_in_order.view(np.uint32)).view(np.int32)
    assert (np.diff(rising.astype(np.int64)) > 0).all()
    assert delta._rising(rising.view(np.uint32)).tobytes() == numbers_in_order.tobytes()
