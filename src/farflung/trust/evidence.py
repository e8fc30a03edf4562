"""Evidence of an audit: likelihood ratios over replayed positions, and the test that may eject a key. Pure; no torch.

A replay (`farflung.engine.base.Replay`) gives at each position the gap Δ between the two best scores, the margin
by which the token that was sent lost, π, the policy's own probability of the pick, and the lead λ, by how much the
policy itself prefers the runner-up to the pick. A margin above a tie is a *flip*,
one above the profile's `far` a *far flip*. Honest numerics flip near-ties and nothing else: calibration bounds the
honest probability q₀(Δ) of a near flip from above (`farflung.trust.bounds`), and `far` is a multiple of the largest
margin that it ever saw, so that a far flip is no rounding at all (q_far, one position in a million; what breaks a
machine is forgiven by η).

**Alternatives.** What a cheat does to q is known well enough without catching one. A node that samples with other noise
flips with probability 1 − π. Whatever shifts the scores (another temperature, fewer bits, other weights) by about s
flips a gap Δ with probability falling as exp(−Δ/s). Another temperature, c times the leased one, says at which
positions: there the gap becomes Δ − (1/c − 1)·λ, and the runner-up is sent where that is below 0; so it is told from
noise of its own size. q₁ ≥ q₀ comes from a short grid: four scales s, four temperatures, "other noise" in three
dilutions, and tokens edited at two rates however sure the policy was of them; each of them over the whole submission
or over one rollout in eight.

**One submission.** LR = ∏ over its audited positions of n₁/q₀ (near flip), f₁/q_far (far flip) or
(1 − n₁ − f₁)/(1 − q₀ − q_far) (none), with n₁ ≥ q₀ and f₁ ≥ q_far. If the honest probabilities of the two kinds of flip
are at most q₀ and q_far at every position, given the past, then the mean of a factor grows with each of them and is 1
at these bounds, so E[LR] ≤ 1 whatever the prompt, the entropy or the routing. A share η of honest
*submissions* may be arbitrarily bad (a flaky card, a driver update); the share is meant per submission, because such
failures come in clumps, which a share per rollout would not forgive. With the cap c, E[min(LR, c)] ≤ 1 + c·η, so
e = min(LR, c)/(1 + c·η) has E[e | past] ≤ 1. A missed weight update, which spoils one submission after the other, is
ruled out before: possession is checked first (`farflung.weights.probe`).

**One key.** For every alternative, with w_k = 1/(k(k + 1)), whose sum from k + 1 on is 1/(k + 1), let M₀ = 0 and
M_k = e_k·(M_{k−1} + w_k). Unrolled, M_k = Σ_{j ≤ k} w_j·e_j·…·e_k: a mixture over the audit j at which the node might
have turned, in the manner of Shiryaev and Roberts. M alone is no supermartingale (it gains w_k), but
N_k = M_k + 1/(k + 1) is: it is ≥ 0, N₀ = 1, and
    E[N_k | past] ≤ M_{k−1} + w_k + 1/(k + 1) = M_{k−1} + 1/k = N_{k−1}.
The mean over the alternatives is one too: it costs ln(alternatives) nats once, where a mean taken at every submission
would cost them again and again. Ville's inequality (1939) gives P(sup N ≥ x) ≤ E[N₀]/x = 1/x, and M < N, so
P(M_k ≥ 1/α for any k, ever) ≤ α. It needs no independence of rollouts, steps or profiles, only E[e_k | past] ≤ 1; hence
**submissions are folded in an order that is fixed before their evidence is known**. A node that turns after k honest
audits pays −ln w_k ≈ 2 ln k nats more than at the start.

Sources: Shafer, Shen, Vereshchagin & Vovk, Test martingales, Bayes factors and p-values, 2011; Ramdas, Grünwald, Vovk
& Shafer, Game-theoretic statistics and safe anytime-valid inference, 2023; Clopper & Pearson 1934 for the bound on q₀.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Final, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, field

from farflung.protocol.numerics import Dtype, Numerics, Verifiers

TIE: Final = 1e-5
"""A margin up to this is no flip: it is the rounding of the noise itself in float32."""
FAR: Final = 1.0
"""The least margin, in nats, that may be called far."""
FAR_FACTOR: Final = 4.0
"""A flip is far from this many times the largest honest rounding on."""
Q_FAR: Final = 1e-6
LIKED: Final = 0.7
"""The share of honest flips to tokens that the policy likes better which is forgiven whatever was seen; half of them
are expected."""
CEILING: Final = 0.95
"""No flip probability is taken to be higher, so that no single position is worth infinitely much."""
SCALES: Final = (0.12, 0.3, 0.8, 2.5)
"""By how much, in nats, the scores of a cheat may be shifted."""
TEMPERATURES: Final = (0.8, 0.9, 1.1, 1.25)
"""By how much a cheat may have multiplied the temperature."""
SHARPNESS: Final = 0.05
"""Scale, in nats, of the noise that blurs where another temperature flips."""
DILUTIONS: Final = (1.0, 0.125, 0.015625)
"""The share of tokens that a cheat may have taken from other noise."""
EDITS: Final = (0.0625, 0.00390625)
"""The share of tokens that a cheat may have replaced by what it likes."""
SHARES: Final = (1.0, 0.125)
"""The share of rollouts that a cheat may have cheated on."""
CAP: Final = 500.0
"""Three submissions at the cap quarantine a new key if but one of the 26 alternatives is there, though the process over
all of its audits is only part of M (`farflung.trust.record`): 0.8·(500/1.15)³/2/26 > 10⁶."""
ODD: Final = 10.0
"""Likelihood ratio at which a rollout is not trained on, though nothing else follows: 1 in 10 of the honest at most."""
ETA: Final = 3e-4
ALPHA: Final = 1e-6
ALPHA_SHARE: Final = 0.8
"""Share of α that this test has. The test of where flips go (`farflung.trust.watch`) may eject too and has the rest:
with more for it, three submissions at the cap that one alternative alone explains would no longer eject a new key."""

Probabilities = Annotated[tuple[float, ...], Meta(min_length=1, max_length=64)]
Counts = Annotated[tuple[int, ...], Meta(min_length=1, max_length=64)]


class Seen(NamedTuple):
    """A replay's view of one rollout: arrays of shape (tokens,), as in `farflung.engine.base.Replay`."""

    gap: np.ndarray
    margin: np.ndarray
    pick: np.ndarray
    lead: np.ndarray


class Tally(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often a replay flipped, by bin of the gap."""

    positions: Counts
    flips: Counts
    edges: Annotated[tuple[float, ...], Meta(max_length=63)] = ()
    """Inner edges of its bins, where they are not those of the profile."""

    @property
    def tokens(self) -> int:
        """Positions in all bins."""
        return sum(self.positions)


class Scope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The scope that a profile was calibrated on, and so the runs that it is for."""

    model: Annotated[str, Meta(max_length=64)]
    """Which architecture, as `farflung.tasks.create_run.Model.digest` has it."""
    temperature: Annotated[float, Meta(gt=0)]
    """Noise of scores grows as 1 ÷ temperature."""
    tokens: Annotated[int, Meta(ge=1)]
    """Most tokens of a completion."""

    def refuses(self, model: str, temperature: float, tokens: int) -> str:
        """Why a run is outside, or nothing."""
        if model != self.model:
            return f"another model ({self.model[:12]}, the run's is {model[:12]})"
        if not math.isclose(temperature, self.temperature, rel_tol=1e-3):
            return f"temperature {self.temperature:g}, the run's is {temperature:g}"
        return f"completions of up to {self.tokens} tokens, the run allows {tokens}" if tokens > self.tokens else ""


class Profile(Numerics, frozen=True):
    """How honest nodes of one kind of arithmetic flip. The name is but a name: the fields of `Numerics` say whose."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    edges: Annotated[tuple[float, ...], Meta(max_length=63)]
    """Inner edges of the gap bins, rising; there is one bin more than edges."""
    q0: Probabilities
    """Upper bound on the honest flip probability, per bin."""
    honest: Tally
    """The counts that `q0` was calibrated on."""
    verified_in: Verifiers
    """Arithmetics of the verifier that it was calibrated with; a validator takes the first that it has room for."""
    far: Annotated[float, Meta(ge=FAR)] = FAR
    """Margin above which a flip is no rounding."""
    q_far: Annotated[float, Meta(gt=0, le=1e-3)] = Q_FAR
    """Upper bound on the honest probability of a far flip."""
    holds_published: bool = True
    """Whether an engine of this kind still has the published values, so that it can show possession of them."""
    margin: Annotated[float, Meta(ge=1)] = 1.0
    """How many times the calibrated noise `q0` forgives."""
    noise: Annotated[float, Meta(ge=0)] = 0.0
    """Root mean square of what log-probabilities of honest nodes differ by, in nats; 0 if that was not measured."""
    choice_bits: Annotated[float, Meta(ge=0)] = 0.0
    """The most that a node can choose unseen within what `q0` allows, in bits a token of the calibration's rollouts."""
    liked: Annotated[float, Meta(gt=0, le=1)] = LIKED
    """The largest share of honest flips that sends a token which the policy likes better; at 1 nothing follows of it
    (`farflung.trust.watch`)."""
    scope: Scope | None = None
    power: Annotated[dict[str, float], Meta(max_length=32)] = field(default_factory=dict)
    """Measured nats per token of the best alternative, by the cheat that was tried; 0 where it cannot be told."""

    def __post_init__(self) -> None:
        bins, counted = len(self.edges) + 1, len(self.honest.edges or self.edges) + 1
        found = [len(row) for row in (self.q0, self.honest.positions, self.honest.flips)]
        if found != [bins, counted, counted]:
            raise ValueError(f"profile {self.name} has {bins} bins, counted in {counted}, but its rows {found}")
        if list(self.edges) != sorted(set(self.edges)) or not all(0 < edge < math.inf for edge in self.edges):
            raise ValueError(f"profile {self.name} has edges {self.edges}; they must rise and be positive")
        if not all(0 < low <= CEILING for low in self.q0):
            raise ValueError(f"profile {self.name} must have 0 < q0 <= {CEILING} in every bin, or the test is unsound")


WEIGHTS_OF: Final = "weights of "
"""Begins the names in a profile's `power` of weights with fewer bits than it has."""


class Profiles(NamedTuple):
    """The profiles that a run admits. A node picks one of their names, and is judged by it."""

    run: Profile
    """The run's own: what a node has that picks none."""
    others: tuple[Profile, ...] = ()

    def of(self, name: str) -> Profile:
        """The profile of a name; the run's own for a name that is not, or no longer, admitted."""
        return next((profile for profile in self.others if profile.name == name), self.run)

    @property
    def names(self) -> list[str]:
        """All of their names, the run's own first."""
        return [one.name for one in self.every]

    @property
    def every(self) -> tuple[Profile, ...]:
        """All of them, the run's own first."""
        return (self.run, *self.others)

    @property
    def dtype(self) -> Dtype:
        """The first arithmetic of a verifier that all of them were calibrated with. Raises ValueError for none."""
        for dtype in self.run.verified_in:
            if all(dtype in one.verified_in for one in self.others):
                return dtype
        found = ", ".join(f"{one.name} in {' and '.join(one.verified_in)}" for one in self.every)
        raise ValueError(f"no arithmetic of a verifier is common to all numerics profiles: {found}")


def to_json(profile: Profile) -> bytes:
    """A profile as canonical JSON: the bytes that an operator signs."""
    return msgspec.json.encode(profile, order="sorted")


def from_json(data: bytes) -> Profile:
    """Read a profile; raises msgspec.ValidationError for unknown fields, wrong types and unsound numbers."""
    return msgspec.json.decode(data, type=Profile)


# --- alternatives ----------------------------------------------------------------------------------------------------

Flip = Callable[[Seen, float], tuple[np.ndarray, np.ndarray]]
"""Probabilities of a near and of a far flip at each position under some cheat, given where far begins."""


def _shifted(scale: float) -> Flip:
    def flip(seen: Seen, far: float) -> tuple[np.ndarray, np.ndarray]:
        any_flip, is_far = 0.5 * np.exp(-seen.gap / scale), math.exp(-far / scale)
        return any_flip * (1 - is_far), any_flip * is_far

    return flip


def _tempered(factor: float) -> Flip:
    def flip(seen: Seen, far: float) -> tuple[np.ndarray, np.ndarray]:
        moved = seen.gap - (1 / factor - 1) * seen.lead
        tail = 0.5 * np.exp(-np.abs(moved) / SHARPNESS)
        return np.where(moved < 0, 1 - tail, tail), np.zeros_like(seen.gap)

    return flip


def _other_noise(share: float) -> Flip:
    return lambda seen, far: (share * (1 - seen.pick) / 2,) * 2


def _edited(share: float) -> Flip:
    return lambda seen, far: (np.zeros_like(seen.gap), np.full_like(seen.gap, share))


CHEATS: Final[Mapping[str, Flip]] = {
    **{f"scores shifted by {scale:g}": _shifted(scale) for scale in SCALES},
    **{f"{factor:g} times the temperature": _tempered(factor) for factor in TEMPERATURES},
    **{f"other noise at {share:g} of tokens": _other_noise(share) for share in DILUTIONS},
    **{f"{share:.2g} of tokens replaced": _edited(share) for share in EDITS},
}
ALTERNATIVES: Final = tuple((cheat, share) for cheat in CHEATS for share in SHARES)
"""(cheat, share of rollouts), in the order of every array below."""


def describe(index: int) -> str:
    """An alternative in words."""
    cheat, share = ALTERNATIVES[index]
    return cheat if share == 1 else f"{cheat}, in {share:g} of rollouts"


def check(seen: Seen) -> None:
    """Raise ValueError for arrays of several shapes, or numbers that no replay gives: NaN would pass for no flip."""
    if len({np.shape(part) for part in seen}) != 1 or not all(np.isfinite(part).all() for part in seen):
        raise ValueError(
            f"gap, margin, pick and lead must be finite and of one shape, not {[np.shape(p) for p in seen]}"
        )
    if (np.minimum(seen.gap, seen.margin) < 0).any() or (seen.pick < 0).any() or (seen.pick > 1.001).any():
        raise ValueError("gaps and margins are never negative, and a pick is a probability")


def flips(seen: Seen) -> int:
    """Tokens that were not what the seed gives, near-ties of honest numerics among them."""
    return int((seen.margin > TIE).sum())


def log_ratios(profile: Profile, seen: Seen) -> np.ndarray:
    """ln LR of one rollout against every cheat of `CHEATS`, shape (cheats,)."""
    check(seen)
    return log_factors(profile, seen).sum(axis=1)


def log_factors(profile: Profile, seen: Seen) -> np.ndarray:
    """ln of the factor that each position gives against every cheat, (cheats, tokens)."""
    near0, far0, is_near, is_far = honest_odds(profile, seen)
    found: list[np.ndarray] = []
    for flip in CHEATS.values():
        near, far = flip(seen, profile.far)
        near = np.clip(near, near0, CEILING)
        far = np.clip(far, far0, np.maximum(far0, 0.99 - near))
        none = np.log((1 - near - far) / (1 - near0 - far0))
        found.append(np.where(is_far, np.log(far / far0), np.where(is_near, np.log(near / near0), none)))
    return np.stack(found)


def allowed_at(profile: Profile, gap: np.ndarray) -> np.ndarray:
    """q₀ at each of these gaps."""
    return np.array(profile.q0)[np.searchsorted(profile.edges, gap, side="right")]


def honest_odds(profile: Profile, seen: Seen) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bounds on the honest probabilities of a near and a far flip at each position, and whether there is one."""
    near0 = allowed_at(profile, seen.gap)
    is_far = np.asarray(seen.margin) > profile.far
    return near0, np.full(near0.shape, profile.q_far), (np.asarray(seen.margin) > TIE) & ~is_far, is_far


def submission_log_ratios(rollouts: Sequence[np.ndarray]) -> np.ndarray:
    """ln LR of one submission against every alternative, from `log_ratios` of its audited rollouts.

    Cheating on a share f of the rollouts has LR = ∏ (1 − f + f·LR of the rollout).
    """
    if not rollouts:
        return np.zeros(len(ALTERNATIVES))
    of_all = np.stack(rollouts)
    mixed = [of_all if f == 1 else np.logaddexp(math.log(1 - f), math.log(f) + of_all) for f in SHARES]
    return np.stack(mixed, axis=-1).sum(axis=0).reshape(-1)


def mean_log_ratio(log_ratios: np.ndarray) -> float:
    """ln of the mean LR over alternatives, an e-value by itself: what one rollout or one submission weighs."""
    return float(np.logaddexp.reduce(log_ratios) - math.log(len(log_ratios)))


def e_values(log_ratios: np.ndarray, cap: float = CAP, eta: float = ETA) -> np.ndarray:
    """The e-values of one submission: min(LR, cap)/(1 + cap·η), computed without overflow."""
    return np.exp(np.minimum(log_ratios, math.log(cap))) / (1 + cap * eta)


def is_bad(log_ratio: float, cap: float = CAP) -> bool:
    """Whether to reject a rollout whose mean LR is at the cap; of the honest 1/cap + η at most (Markov)."""
    return log_ratio >= math.log(cap)


def is_void(log_ratios: np.ndarray, cap: float = CAP) -> bool:
    """Whether a submission's LR against any one alternative is at the cap: there it weighs all it can, so that an audit
    may stop, and the submission is void.

    That happens to alternatives/cap + η of the honest at most (Markov). It never ejects by itself. A mean over the
    alternatives instead would cost ln(alternatives) nats more of every submission.
    """
    return is_bad(float(log_ratios.max()), cap)


def further(log_ratios: np.ndarray, done: int, cap: float = CAP) -> int:
    """How many rollouts more an audit replays after `done` of them: none once they void the submission, one while any
    alternative explains them better than honesty, else as many again.
    """
    if is_void(log_ratios, cap):
        return 0
    return 1 if log_ratios.max() > 0 else done


# --- one key ---------------------------------------------------------------------------------------------------------

HIGHEST: Final = 1e300
"""M stops here. Below is harmless too: an M that underflows to 0 is only milder, and the next weight is added to it."""


def fold(m: np.ndarray, k: int, e: np.ndarray) -> tuple[np.ndarray, int]:
    """Take one more audited submission: (M_{k−1}, k − 1, e_k) → (M_k, k) with M_k = e_k·(M_{k−1} + 1/(k(k + 1)))."""
    k += 1
    return np.minimum(e * (m + 1 / (k * (k + 1))), HIGHEST), k


def limit(alpha: float = ALPHA) -> float:
    """Where M ejects: an honest key ever reaches it with probability at most `ALPHA_SHARE` α (Ville; see above)."""
    return 1 / (ALPHA_SHARE * alpha)
