"""Requests that come, go and change rows in a foreign engine's batch keep their seed and their position."""

import random

import pytest

torch = pytest.importorskip("torch")

from farflung.engine.noise import gumbel  # noqa: E402
from farflung.engine.seeded_rows import SEED, TEMPERATURE, Asked, SeededRows, asked  # noqa: E402

VOCAB = 11


def noise_of(rows: SeededRows, height: int) -> torch.Tensor:
    """What is added to logits of zero."""
    return rows.add_noise(torch.zeros(height, VOCAB))


def expected(seed: int, position: int) -> torch.Tensor:
    return gumbel([seed], [position], VOCAB)[0]


def test_a_request_without_a_seed_is_left_alone() -> None:
    rows = SeededRows()
    rows.put(0, asked(None), 3, [])
    rows.put(1, asked({"something": 1}), 3, [])
    assert not noise_of(rows, 2).any()


def test_noise_goes_by_seed_position_and_temperature() -> None:
    rows = SeededRows()
    rows.put(1, Asked(2**53 - 1, 0.5), 4, [7, 8, 9])
    logits = torch.arange(3.0 * VOCAB).view(3, VOCAB)
    found = rows.add_noise(logits.clone())
    assert torch.equal(found[1], logits[1] / 0.5 + expected(2**53 - 1, 6))
    assert torch.equal(found[[0, 2]], logits[[0, 2]])


def test_a_full_batch_and_a_part_of_it_get_the_same() -> None:
    rows = SeededRows()
    for row in range(3):
        rows.put(row, Asked(row, 0.7), 1, [0] * row)
    logits = torch.randn(4, VOCAB)
    assert torch.equal(rows.add_noise(logits[:3].clone()), rows.add_noise(logits.clone())[:3])


def test_tokens_that_the_engine_appends_move_the_position() -> None:
    rows, ids = SeededRows(), [1]
    rows.put(0, Asked(5, 1.0), 10, ids)
    ids += [2, 3]
    assert torch.equal(noise_of(rows, 1)[0], expected(5, 12))


def test_moves_take_the_row_and_swaps_keep_both() -> None:
    rows = SeededRows()
    for row in range(3):
        rows.put(row, Asked(row, 1.0), 1, [])
    rows.move(2, 0, is_swap=False)
    assert torch.equal(noise_of(rows, 2), torch.stack([expected(2, 0), expected(1, 0)]))
    rows.move(0, 1, is_swap=True)
    assert torch.equal(noise_of(rows, 2), torch.stack([expected(1, 0), expected(2, 0)]))
    rows.put(0, None, 1, [])
    rows.move(1, 0, is_swap=True)
    assert torch.equal(noise_of(rows, 2), torch.stack([expected(2, 0), torch.zeros(VOCAB)]))


@pytest.mark.parametrize("chance", range(20))
def test_any_order_of_events_ends_as_a_plain_list_would(chance: int) -> None:
    rng = random.Random(chance)
    rows, batch = SeededRows(), []
    for step in range(60):
        match rng.choice(("add", "swap", "leave")) if len(batch) > 1 else "add":
            case "add":
                wanted = Asked(step, 1.0) if rng.random() < 0.7 else None
                batch.append((wanted, rng.randrange(1, 5), [0] * rng.randrange(4)))
                rows.put(len(batch) - 1, *batch[-1])
            case "swap":
                a, b = rng.sample(range(len(batch)), 2)
                batch[a], batch[b] = batch[b], batch[a]
                rows.move(a, b, is_swap=True)
            case "leave":  # and the last one fills the gap
                gone = rng.randrange(len(batch))
                rows.drop(gone)
                last = batch.pop()
                if gone < len(batch):
                    batch[gone] = last
                    rows.move(len(batch), gone, is_swap=False)
        true = [
            torch.zeros(VOCAB) if wanted is None else expected(wanted.seed, prompt - 1 + len(ids))
            for wanted, prompt, ids in batch
        ]
        assert torch.equal(noise_of(rows, len(batch)), torch.stack(true))


@pytest.mark.parametrize("seed", [-1, 2**53, 1.5, "7", True, None])
def test_a_seed_is_a_whole_number_of_53_bits(seed: object) -> None:
    with pytest.raises(ValueError, match=SEED):
        asked({SEED: seed})


@pytest.mark.parametrize("temperature", [0, -1.0, 2.1, float("nan"), float("inf"), "1"])
def test_a_temperature_is_positive_and_at_most_2(temperature: object) -> None:
    with pytest.raises(ValueError, match=TEMPERATURE):
        asked({SEED: 1, TEMPERATURE: temperature})
