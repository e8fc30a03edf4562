"""A share of the time: rests between tokens, so that a processor works as much as its owner allows."""

import time
from collections.abc import Callable

MOST_S = 0.2
"""A longer rest is made of several, so that no stop waits for its end."""
MOST_OWED_S = 60.0


class Throttle:
    """Owes a rest for all work, in the ratio of the share."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._at_s = 0.0
        self.owed_s = 0.0

    def begin(self) -> None:
        """Work begins here; what was before counts for nothing."""
        self._at_s = self._clock()

    def owe(self, share: float) -> None:
        """For all work since the last call."""
        now_s = self._clock()
        self.owed_s = min(MOST_OWED_S, self.owed_s + (now_s - self._at_s) * (1 / share - 1))
        self._at_s = now_s

    def rest(self, share: float, is_over: Callable[[], bool]) -> None:
        """Between two tokens, until a stop is asked for."""
        self.owe(share)
        while self.owed_s > 0 and not is_over():
            self.pay(min(self.owed_s, MOST_S))

    def pay(self, seconds: float) -> None:
        """Rest so long; what the clock says of it is what is paid."""
        self._sleep(seconds)
        now_s = self._clock()
        self.owed_s = max(0.0, self.owed_s - (now_s - self._at_s))
        self._at_s = now_s
