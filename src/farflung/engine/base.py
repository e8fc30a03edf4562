"""Requests, completions and replays: the interface of every engine. No torch, so that any role may name them.

An engine holds one policy and does two things with it: it *generates* completions with seeded noise, and it
*replays* a given completion in one prefill to say, position by position, what the same policy would have picked.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from farflung.protocol.errors import WeightsError
from farflung.protocol.probe import Slice
from farflung.protocol.stops import DONE, Stops


@dataclass(frozen=True, slots=True)
class Request:
    """One sample to generate: the prompt, its seed, and how far it may go."""

    prompt_ids: tuple[int, ...]
    seed: int
    """Seed of the sample, of 53 bits; the noise is a pure function of (seed, position, token)."""
    temperature: float
    """0 is greedy: no noise at all."""
    max_new_tokens: int
    """Most tokens to generate, the end-of-sequence token included."""

    @property
    def first_position(self) -> int:
        """Position of the noise of the first generated token: that of the prompt's last token, counted from 0."""
        return len(self.prompt_ids) - 1


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer of a policy: its ids end with an end token or a stop string, or there are `max_new_tokens` of them."""

    ids: tuple[int, ...]
    logp: tuple[float, ...]
    """Log-probability of each token at the sampling temperature; a metric, believed by no role."""


@dataclass(slots=True)
class Answer:
    """A completion under way, token by token."""

    request: Request
    said: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    """Its tokens so far, each with its log-probability."""
    _state: int = field(default=0, init=False)
    """Progress in the stop strings."""

    def add(self, token: int, logp: float, eos_ids: frozenset[int], stops: Stops | None) -> Completion | None:
        """Say one token more; gives the completion if that ends it."""
        self.said.append((token, logp))
        self._state = 0 if stops is None else int(stops.moves_SV[self._state, token])
        is_full = len(self.said) == self.request.max_new_tokens
        is_over = token in eos_ids or self._state == DONE or is_full
        return Completion(*zip(*self.said, strict=True)) if is_over else None


@dataclass(frozen=True, slots=True)
class Replay:
    """The verifier's view of each generated position of one rollout. Arrays are float32 of shape (tokens,)."""

    gap: np.ndarray
    """Distance between the two best scores `logits / T + noise` (the logits themselves when greedy), >= 0."""
    margin: np.ndarray
    """Best score minus the score of the token that was sent, >= 0; 0 where they agree."""
    pick: np.ndarray
    """Probability that the policy itself gives to the best-scored token, in (0, 1]; 1 when greedy.

    A node that samples from the policy with other noise sends another token with probability 1 - pick."""
    lead: np.ndarray
    """By how much the policy itself prefers the second best score's token to the best one's: log-probability of that
    one less that of this one, at the sampling temperature; often below 0."""
    logp: np.ndarray
    """Log-probability of the token that was sent, at the sampling temperature."""


class Engine(Protocol):
    """One policy in memory."""

    eos_ids: frozenset[int]
    stops: Stops | None
    made: int
    """Rises while it generates, with every token or every token of a batch; what it counts from is of no account."""

    def load(self, tensors: Iterable[tuple[str, Any]]) -> None:
        """Replace the weights by (name, tensor) pairs; every parameter must be given exactly once.

        Raises WeightsError, after which the engine refuses to work until a complete load succeeds.
        """
        ...

    def values(self, slices: Sequence[Slice]) -> bytes:
        """These slices of the weights as they lie in the engine, in bfloat16, the type in which they are published."""
        ...

    def generate(
        self, requests: Sequence[Request], should_stop: Callable[[], bool] | None = None
    ) -> list[Completion | None]:
        """Generate every request, in order; results do not depend on how requests are batched but for rounding.

        `should_stop` is asked every now and then; once it returns True, generation ends and requests that are not
        complete are None.
        """
        ...

    def replay(self, items: Sequence[tuple[Request, Sequence[int]]], *, alone: bool = False) -> list[Replay]:
        """Prefill each (request, completion ids) once and compare each token with the seeded pick.

        With `alone` each is read by itself, sharing and padding nothing: slow, and another path than the usual one.
        """
        ...


def refuse_empty(requests: Sequence[Request]) -> None:
    """Raise ValueError for a request with nothing to read or nothing to say."""
    for index, request in enumerate(requests):
        if not request.prompt_ids or request.max_new_tokens < 1:
            raise ValueError(f"request {index} needs a prompt and max_new_tokens of at least 1: {request}")


def unloaded() -> WeightsError:
    """The error of an engine that is asked before its weights are there."""
    return WeightsError("the engine holds no complete weights; load all tensors of one step first")
