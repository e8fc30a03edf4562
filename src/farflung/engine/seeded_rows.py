"""Seeds of the rows in a foreign engine's batch, as requests come, go and change places. No vLLM here.

Legend: B rows of the batch, V vocabulary.
"""

from collections.abc import Mapping, Sequence, Sized
from typing import Any, Final, NamedTuple

import torch

from farflung.engine.noise import gumbel

SEED: Final = "farflung_seed"
TEMPERATURE: Final = "farflung_temperature"
"""Names of a request's extra arguments; one without a seed is left alone."""


class Asked(NamedTuple):
    """How one request wants to be sampled."""

    seed: int
    """53 bits, not negative."""
    temperature: float


def asked(extra: Mapping[str, Any] | None) -> Asked | None:
    """The wish in a request's extra arguments, None without a seed. Raises ValueError for nonsense."""
    if not extra or SEED not in extra:
        return None
    seed, temperature = extra[SEED], extra.get(TEMPERATURE, 1.0)
    if type(seed) is not int or not 0 <= seed < 1 << 53:
        raise ValueError(f"{SEED} is {seed!r}; it must be a whole number of 53 bits, not negative")
    if type(temperature) not in (int, float) or not 0 < temperature <= 2:
        raise ValueError(f"{TEMPERATURE} is {temperature!r}; it must be above 0 and at most 2")
    return Asked(seed, float(temperature))


class SeededRows:
    """The seeded rows of a batch; the noise of the next token has the position of the token before it."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[Asked, int, Sized]] = {}

    def put(self, row: int, wanted: Asked | None, prompt: int, output_ids: Sized) -> None:
        """A request takes a row; its prompt has so many tokens, `output_ids` the engine goes on appending to."""
        if wanted is None:
            self.drop(row)
        else:
            self._rows[row] = (wanted, prompt, output_ids)

    def drop(self, row: int) -> None:
        """The request of a row has left."""
        self._rows.pop(row, None)

    def move(self, source: int, target: int, *, is_swap: bool) -> None:
        """A request takes another's row, which leaves, or moves to `source` if they swap."""
        moved, other = self._rows.pop(source, None), self._rows.pop(target, None)
        if moved is not None:
            self._rows[target] = moved
        if is_swap and other is not None:
            self._rows[source] = other

    def add_noise(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """float32 logits to `logits / T + noise`, in place, where there is a seed."""
        places = [(row, wanted, prompt - 1 + len(ids)) for row, (wanted, prompt, ids) in sorted(self._rows.items())]
        return add_noise(logits_BV, places)


def add_noise(logits_BV: torch.Tensor, places: Sequence[tuple[int, Asked, int]]) -> torch.Tensor:
    """float32 logits to `logits / T + noise`, in place, at each (row, what it wants, position)."""
    if not places:
        return logits_BV
    device, vocab = logits_BV.device, logits_BV.shape[1]
    rows, wanted, positions = zip(*places, strict=True)
    noise_RV = gumbel([one.seed for one in wanted], list(positions), vocab, device)
    divisor_R1 = torch.tensor([[one.temperature] for one in wanted], device=device)
    if rows == tuple(range(len(logits_BV))):
        return logits_BV.div_(divisor_R1).add_(noise_RV)
    row_R = torch.tensor(rows, device=device)
    logits_BV[row_R] = logits_BV[row_R].div_(divisor_R1).add_(noise_RV)
    return logits_BV
