"""Stop strings: with which token of a rollout one of them is complete. A pure function of ids, the same for everybody.

Legend: S states (what was seen of the stop strings so far), V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from farflung.protocol.errors import Malformed

STOPS = "stops.u8"
"""Name of the table among the files of a run."""
DONE = 255
"""The state of a rollout in which a stop string is complete; it never leaves it."""
MOST_STATES = 128
MOST_BYTES = 1 << 25
"""Of a table: all states of a vocabulary of 262,144."""


class Stops:
    """The progress that each token makes in the stop strings: a table of states, made where the tokenizer is."""

    def __init__(self, moves_SV: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """The state after each token of the vocabulary, for each state before it; a rollout begins in 0."""
        self.moves_SV = moves_SV

    @classmethod
    def unpack(cls, data: bytes, vocab: int) -> "Stops":
        """From the bytes of a file that came with the run's descriptor. Raises Malformed."""
        states, rest = divmod(len(data), vocab)
        if rest or not 1 <= states <= MOST_STATES:
            raise Malformed(f"a table of stop strings has {len(data)} bytes; a vocabulary of {vocab} needs multiples")
        moves_SV = np.frombuffer(data, np.uint8).reshape(states, vocab)
        if bool(((moves_SV >= states) & (moves_SV != DONE)).any()):
            raise Malformed(f"a table of stop strings with {states} states leads to one that it has not")
        return cls(moves_SV)

    def pack(self) -> bytes:
        """As a file for those who have no tokenizer."""
        return self.moves_SV.tobytes()

    def at_once(self) -> list[int]:
        """Tokens in which a whole stop string lies."""
        return np.flatnonzero(self.moves_SV[0] == DONE).tolist()

    def end(self, ids: Iterable[int]) -> int:
        """Number of tokens with which the first stop string is complete, or 0 if none is."""
        moves_SV, state = self.moves_SV, 0
        for count, token in enumerate(ids, 1):
            state = moves_SV[state, token]
            if state == DONE:
                return count
        return 0


def until(text: str, strings: Sequence[str]) -> str:
    """A text before its first stop string: what is scored."""
    return text[: min((at for one in strings if (at := text.find(one)) >= 0), default=len(text))]
