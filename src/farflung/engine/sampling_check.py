"""Whether a foreign engine samples as the run asks: its own scores say which tokens it should have sent. Pure.

An engine is asked for short texts with the log-probabilities of its likeliest tokens at every place. Each token that it
sent must have the best of the scores log-probability / T + noise. That needs no model here, so it tells an engine that
samples in another way from one that computes in another way, and one fault from the others.

Legend: K tokens whose log-probability is known at a place.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from farflung.engine.base import Request
from farflung.engine.noise import bits_at, gumbel_numpy

TOP: Final = 20
"""How many of the likeliest tokens an engine is asked for; stock servers give no more."""
_FREE: Final = tuple((temperature, 16) for temperature in (1.0, 2.0, 0.7, 1.5, 0.5, 2.0))
_SHORT: Final = ((1.0, 8), (2.0, 8))
"""Temperature and tokens of each text, at the first load and at later ones."""
_FORCED, _FORCED_T, _SEEDS = 24, 2.0, 1 << 14
_SEED: Final = 4_807_526_976
_TOLERANCE: Final = 1e-3
"""Between the scores of a server and those from what it reports, which is rounded."""
_UNSEEN: Final = 0.03
"""A share of tokens that may stay unexplained: the winner may be none of those reported."""
_SURE: Final = 1e-6 / 2 ** (_FORCED // 2)
"""How improbable it must be, for any choice of the forced tokens, that a right engine leaves them out."""
_MEND = {
    "seeds": "ignores the seeds of requests; use vLLM 0.31 or later with its second model runner",
    "speculation": "decodes speculatively, which keeps no noise; start it without --speculative-config",
    "watermark": "puts a watermark into its text; start it without --watermark-config",
    "penalty": "penalises tokens that came before, though asked not to",
    "temperature": "samples at another temperature than asked",
    "likeliest": "chooses among its likeliest tokens only (top-k, top-p or min-p), though asked not to",
    "noise": (
        "samples with another noise: that of a vLLM before 0.31, of its first model runner (on CPUs, or "
        "VLLM_USE_V2_MODEL_RUNNER=0) or of --use-fp64-gumbel. Use another, or give it the run's noise: "
        "--logits-processors farflung.engine.vllm_noise:SeededNoise"
    ),
    "head": 'rounds its logits to 16 bits; start it with --hf-overrides \'{"head_dtype": "float32"}\'',
    "prefixes": "goes on with prefixes of the weights before; start it with --no-enable-prefix-caching",
}
_CHANGES = "; look for a proxy in between, or for --override-generation-config"
"""What may change parameters that are sent explicitly."""


class Place(NamedTuple):
    """One token that was sent, and the tokens whose log-probability (at temperature 1) the engine told, itself too."""

    token: int
    ids_K: np.ndarray
    logp_K: np.ndarray


class Forced(NamedTuple):
    """A request whose noise all but forces one unlikely token, if all tokens are chosen from."""

    request: Request
    token: int


Text = tuple[Request, Sequence[Place]]


def texts(vocab: int, *, is_first: bool) -> list[Request]:
    """Texts to ask for after a load; the first comes twice, at the end again."""
    asked = [
        Request(_prompt(vocab, 5 + 3 * i), _SEED + i, temperature, tokens)
        for i, (temperature, tokens) in enumerate(_FREE if is_first else _SHORT)
    ]
    return [*asked, asked[0]]


def forced(vocab: int) -> list[Forced]:
    """Requests of one token each: of many seeds and some tokens all over the vocabulary, those with the most noise.

    In every second one the token is one of the prompt's.
    """
    everywhere = np.linspace(0, vocab - 1, 64).astype(np.int64)
    found: list[Forced] = []
    for i in range(_FORCED):
        prompt = _prompt(vocab, 25 + 2 * (i % 4))
        token_C = np.unique(prompt if i % 2 else everywhere)
        seed_S = np.arange(_SEEDS, dtype=np.uint64) + np.uint64(_SEED + (i + 1 << 20))
        hash_SC = bits_at(np.repeat(seed_S, len(token_C)), len(prompt) - 1, np.tile(token_C, len(seed_S)))
        seed, token = divmod(int(hash_SC.argmin()), len(token_C))
        found.append(Forced(Request(prompt, int(seed_S[seed]), _FORCED_T, 1), int(token_C[token])))
    return found


def _prompt(vocab: int, length: int) -> tuple[int, ...]:
    """Tokens from all over; where the length is even, three of them again and again, so that a penalty shows."""
    return tuple((7919 * ((k if length % 2 else k % 3) + 1) + 31 * length) % vocab for k in range(length))


def fault(told: Sequence[Text], is_known: str = "") -> str:
    """Which fault shows in texts as `texts` asks for them, in a sentence; nothing where there is none.

    `is_known` names one that the engine tells of itself.
    """
    if is_known:
        return _MEND[is_known]
    *free, again = told
    if _share(free) >= 1 - _UNSEEN and _share([again]) >= 1 - 4 * _UNSEEN:
        return _MEND["head"] if _is_rounded(free) else ""
    if [one.token for one in free[0][1]] != [one.token for one in again[1]] and _share(free) < 0.6:
        return _MEND["seeds"]
    if temperature := _temperature(free):
        return f"{_MEND['temperature']} ({temperature:.2g} or so){_CHANGES}"
    missed = list(_missed(free))
    if _most(is_before for is_before, _ in missed):
        return _MEND["penalty"] + _CHANGES
    if _most(is_likelier for _, is_likelier in missed):
        return _MEND["likeliest"] + _CHANGES
    return _MEND["noise"]


def withheld(asked: Sequence[Forced], sent: Sequence[int], places: Sequence[Place], vocab: int) -> str:
    """Whether unlikely tokens, or those that came before, are never chosen: a sentence, or nothing.

    `places` tell of the forced tokens.
    """
    missed: dict[bool, list[float]] = {False: [], True: []}
    for one, token, place in zip(asked, sent, places, strict=True):
        if token != one.token:
            missed[one.token in one.request.prompt_ids].append(1 - _chance(one, place, vocab))
    if np.prod(missed[False]) < _SURE:
        return _MEND["likeliest"] + _CHANGES
    return _MEND["penalty"] + _CHANGES if np.prod(missed[True]) < _SURE else ""


def stale_prefixes(fresh: Sequence[Place], again: Sequence[Place], noise: Sequence[Place]) -> str:
    """Whether a prompt that was there before the load is read with the weights of before: a sentence, or nothing.

    `fresh` and `noise` read it under two names of which nothing can be kept; their distance is that of rounding.
    """
    return _MEND["prefixes"] if _distance(fresh, again) > max(0.02, 10 * _distance(fresh, noise)) else ""


def _distance(one: Sequence[Place], other: Sequence[Place]) -> float:
    """The largest difference of log-probabilities that both tell, at the first place: after it the texts may differ."""
    a, b = (dict(zip(p[0].ids_K.tolist(), p[0].logp_K.tolist(), strict=True)) for p in (one, other))
    return max((abs(a[token] - b[token]) for token in a.keys() & b.keys()), default=np.inf)


def _noise(request: Request, at: int, ids_K: np.ndarray) -> np.ndarray:
    return gumbel_numpy(bits_at([request.seed] * len(ids_K), request.first_position + at, ids_K))


def scores(request: Request, at: int, place: Place, temperature: float = 0.0) -> np.ndarray:
    """Log-probability / T + noise of the tokens told of (K,), up to what all of them have in common."""
    return place.logp_K / (temperature or request.temperature) + _noise(request, at, place.ids_K)


def _share(told: Iterable[Text], temperature: float = 0.0) -> float:
    """The share of tokens that have the best score."""
    found = [
        _lost(scores(request, at, place, temperature), place) <= _TOLERANCE
        for request, places in told
        for at, place in enumerate(places)
    ]
    return sum(found) / max(1, len(found))


def _lost(score_K: np.ndarray, place: Place) -> float:
    """By how much the token that was sent is below the best."""
    return float(score_K.max() - score_K[place.ids_K == place.token].max())


def _temperature(free: Sequence[Text]) -> float:
    """One temperature for all that explains every token but one, 0 if there is none."""
    tried = np.geomspace(0.05, 4, 160)
    share, best = max((_share(free, float(t)), float(t)) for t in tried)
    return best if share * (count := sum(len(places) for _, places in free)) >= count - 1 else 0.0


def _missed(free: Sequence[Text]) -> Iterator[tuple[bool, bool]]:
    """Of each token that should have been sent and was not: was it there before, and is what was sent likelier?"""
    for request, places in free:
        before = set(request.prompt_ids)
        for at, place in enumerate(places):
            score_K = scores(request, at, place)
            best = int(score_K.argmax())
            if _lost(score_K, place) > _TOLERANCE:
                is_likelier = bool(place.logp_K[place.ids_K == place.token].max() > place.logp_K[best])
                yield int(place.ids_K[best]) in before, is_likelier
            before.add(place.token)


def _most(seen: Iterable[bool]) -> bool:
    found = list(seen)
    return len(found) > 2 and sum(found) >= 0.9 * len(found)


def _is_rounded(free: Sequence[Text]) -> bool:
    """Whether logits lie on a grid of 1/256, as those of 16 bits do between 2 and 32; others are anywhere."""
    gap_N = np.concatenate([np.diff(np.sort(place.logp_K)) for _, places in free for place in places])
    gap_N = gap_N[gap_N > 1e-4]  # of equal logits nothing can be told
    off_N = np.abs(gap_N * 256 - np.round(gap_N * 256)) / 256
    return len(gap_N) > 50 and float((off_N < 1e-5).mean()) > 0.5


def _chance(one: Forced, place: Place, vocab: int) -> float:
    """A lower bound of the probability, over the noise of all others, that a forced token is the best."""
    own = place.logp_K[place.ids_K == one.token]
    if not own.size or own[0] < -1000:
        return 0.0
    other_K = place.logp_K[place.ids_K != one.token]
    left = max(0.0, 1 - float(np.exp(other_K).sum()))
    # the sum of p^(1/T) over the others: of those not told of, at most as if all were equal (Hölder)
    rest = max(1, vocab - len(other_K)) ** (1 - 1 / _FORCED_T) * left ** (1 / _FORCED_T)
    total = float(np.exp(other_K / _FORCED_T).sum()) + rest
    score = own[0] / _FORCED_T + float(_noise(one.request, 0, np.array([one.token]))[0])
    return float(np.exp(-total * np.exp(-score)))
