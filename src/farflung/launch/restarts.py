"""Restarts in an embedded run: the roles that ended and are worth starting again. Pure."""

import signal
from dataclasses import dataclass, field

from farflung.launch.logs import alike

REFUSED = 78
"""Exit code of a role or a calibration whose configuration is wrong (EX_CONFIG of sysexits.h): it would again."""
MOST, MOST_ALIKE = 20, 3
"""Ends of one role that a run bears in all, and in a row when each is like the one before."""
LONG_S, STEADY_S = 600.0, 10.0
"""A role that lived longer than that did not end as it did before; one killed from outside not even after this."""


@dataclass
class Restarts:
    """How often each role has ended, and how."""

    most: int = MOST
    most_alike: int = MOST_ALIKE
    count: dict[str, int] = field(default_factory=dict[str, int])
    _alike: dict[str, tuple[tuple[int, str], int]] = field(default_factory=dict[str, tuple[tuple[int, str], int]])

    def refuse(self, name: str, code: int, words: str, lived_s: float) -> str:
        """Note an end by accident, and say why the role is not to be started again; nothing where it is."""
        self.count[name] = self.count.get(name, 0) + 1
        same = self._in_a_row(name, (code, alike(words)), lived_s)
        if code == REFUSED:
            return words or "its configuration is wrong"
        if same >= self.most_alike:
            return f"{name} ended {same} times the same way, with {code}: {words or 'without a word'}"
        if self.count[name] > self.most:
            return f"{name} ended {self.count[name]} times, the last time with {code}: {words or 'without a word'}"
        return ""

    def _in_a_row(self, name: str, how: tuple[int, str], lived_s: float) -> int:
        before, count = self._alike.get(name, (how, 0))
        is_another = lived_s > (STEADY_S if how[0] < 0 else LONG_S)
        count = 1 if is_another or before != how else count + 1
        self._alike[name] = how, count
        return count


def killed_by(code: int) -> str:
    """The meaning of a negative exit code."""
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + ("; was there memory enough?" if code == -signal.SIGKILL else "")
