"""Coordinator: stop strings as a table over tokens, so that nodes without a tokenizer end where the text does.

Legend: S states (proper beginnings of stop strings), V vocabulary, L bytes of the longest token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from farflung.protocol.errors import ConfigError
from farflung.protocol.stops import DONE, MOST_BYTES, Stops
from farflung.tasks.model import Model

Table = np.ndarray[Any, np.dtype[np.uint8]]
_BYTES = 256
_PART = "\ufffd".encode()
_BEFORE = "a"
"""A text behind which each token shows what it adds; alone, some lose the space that they begin with."""


def stops_of(model: Model, strings: Sequence[str]) -> Stops | None:
    """The table of these stop strings; None for none. Raises ConfigError for one that this tokenizer cannot show."""
    if not strings:
        return None
    wanted = [one.encode() for one in strings]
    moves = _moves_of_bytes(wanted)
    size = _states(moves) * model.vocab
    if size > MOST_BYTES:
        raise ConfigError(
            f"generate.stop = {list(strings)!r} takes a table of {size / 1e6:.0f} MB with the {model.vocab} tokens of "
            f"model {model.path!r}, more than {MOST_BYTES / 1e6:.0f}; write fewer or shorter strings"
        )
    stops = Stops(_moves_of_tokens(moves, _token_bytes(model)))
    for one in strings:
        _refuse_hidden(model, stops, one)
    return stops


def _refuse_hidden(model: Model, stops: Stops, string: str) -> None:
    ids = model.tokenizer.encode(_BEFORE + string, add_special_tokens=False).ids
    if not stops.end(ids):
        raise ConfigError(
            f"generate.stop has {string!r}, which the tokenizer of model {model.path!r} writes as tokens {ids} that "
            f"read {model.tokenizer.decode(ids)!r}; choose a string of letters and signs that it keeps"
        )


def _token_bytes(model: Model) -> list[bytes]:
    """The bytes that each token of the vocabulary adds to a text, as UTF-8; none for ids that no token has.

    Bytes that are a part of a sign show as U+FFFD and become one that no text has.
    """
    tokenizer = model.tokenizer
    before = tokenizer.encode(_BEFORE, add_special_tokens=False).ids
    start = len(tokenizer.decode(before, skip_special_tokens=False))
    texts = tokenizer.decode_batch([[*before, token] for token in range(model.vocab)], skip_special_tokens=False)
    return [text[start:].encode().replace(_PART, b"\xff") for text in texts]


def _moves_of_bytes(wanted: Sequence[bytes]) -> Table:
    """The state after each byte (256, 256): states are the proper beginnings of stop strings, the empty one is 0."""
    beginnings = sorted({one[:end] for one in wanted for end in range(len(one))}, key=lambda one: (len(one), one))
    number = {one: state for state, one in enumerate(beginnings)}
    moves = np.zeros((_BYTES, _BYTES), np.uint8)
    moves[DONE] = DONE
    for beginning, state in number.items():
        for byte in {byte for one in wanted for byte in one}:
            seen = beginning + bytes([byte])
            ends = (seen[start:] for start in range(len(seen) + 1))
            moves[state, byte] = DONE if seen.endswith(tuple(wanted)) else next(number[e] for e in ends if e in number)
    return moves


def _states(moves: Table) -> int:
    """How many states can be reached."""
    return int(moves[moves != DONE].max()) + 1


def _moves_of_tokens(moves: Table, pieces: Sequence[bytes]) -> Table:
    """The state after each token (S, V): its bytes one after the other."""
    order = np.argsort([-len(piece) for piece in pieces], kind="stable")
    state_SV = np.repeat(np.arange(_states(moves), dtype=np.uint8)[:, None], len(pieces), 1)
    longest = len(pieces[order[0]])
    bytes_VL = np.array([pieces[token].ljust(longest, b"\0") for token in order], f"S{longest or 1}")
    bytes_VL = bytes_VL.view(np.uint8).reshape(len(pieces), -1)
    counts = np.array([len(pieces[token]) for token in order])
    for place in range(longest):
        live = int((counts > place).sum())
        state_SV[:, :live] = moves[state_SV[:, :live], bytes_VL[:live, place]]
    found_SV = np.empty_like(state_SV)
    found_SV[:, order] = state_SV
    return found_SV
