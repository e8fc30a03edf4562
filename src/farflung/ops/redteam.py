"""The gallery of adversaries: engines that do something else than what the lease says. For runs of one's own only."""

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from farflung.engine.base import Completion, Engine, Replay, Request


class Unseeded:
    """Samples honestly from the right policy, but with noise of its own choosing; so it could choose among many."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.eos_ids = engine.eos_ids

    def load(self, tensors: Iterable[tuple[str, Any]]) -> None:
        """As the honest engine."""
        self._engine.load(tensors)

    def generate(
        self, requests: Sequence[Request], should_stop: Callable[[], bool] | None = None
    ) -> list[Completion | None]:
        """As the honest engine, under other seeds."""
        return self._engine.generate([replace(r, seed=secrets.randbits(64)) for r in requests], should_stop)

    def replay(self, items: Sequence[tuple[Request, Sequence[int]]]) -> list[Replay]:
        """As the honest engine."""
        return self._engine.replay(items)


GALLERY: dict[str, Callable[[Engine], Engine]] = {"unseeded": Unseeded}
