"""Assignment: the choice behind every lease, as a pure function. No SQL, no clock, no randomness.

A lease has exactly one policy step. In order:

1. *urgent* samples: handed back or lapsed ones, and those of older steps, which no other node will come for. One that
   is left over keeps a whole group from training. The node's loaded step before others, then the oldest;
2. samples of unfinished groups, then new groups, at the node's *home*: its loaded step if that is recent enough, else
   the latest one;
3. if there is nothing at home, the latest step, then unfinished groups at any other fresh one, newest first.

The rest of a lease is filled at the same step.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from farflung.protocol.seeds import derive, task_key

SCAN_TASKS = 64
"""Tasks to look at for one that fits a node's context, before it is told to wait."""


@dataclass(frozen=True, slots=True)
class AssignSettings:
    """How samples are handed out."""

    max_staleness: int = 2
    """A rollout may be trained on while the latest step is at most this many ahead of its own."""
    max_lag: int = 1
    """A node may go on opening groups at its loaded step while the latest is at most this many ahead."""
    lease_rollouts: int = 16
    """Most rollouts in one lease of a node of which nothing else is known."""
    lease_minimum: int = 4
    """A node with fewer free slots than this is still leased so many; it does them one after the other."""
    group_size: int = 16
    """Samples per group."""
    groups_ahead: int = 64
    """New groups are opened while fewer than this many are in progress or wait to be trained on."""


@dataclass(frozen=True, slots=True)
class Asker:
    """The node that asks."""

    loaded: int | None
    """The policy step it has in memory, if any."""
    free_slots: int
    max_context: int
    """Tokens that prompt and completion together may have."""
    node: str = ""
    most: int = 0
    """Rollouts in a lease of it; 0 for `lease_rollouts`."""


@dataclass(frozen=True, slots=True)
class OpenSamples:
    """Samples of one group that no node has: never leased, or open again. A group may appear more than once."""

    group: str
    task: str
    step: int
    samples: tuple[int, ...]
    needed_tokens: int
    """Prompt and max_new_tokens together."""
    reissued_at: float | None = None
    """When they came open again, or may be leased again if that lies ahead of now; None if never leased."""
    not_for: frozenset[str] = frozenset()
    """Nodes that handed these in before. The seed is the same and a node's arithmetic too, so its rounding would flip
    the same tokens again: evidence that was counted would be counted twice."""


@dataclass(frozen=True, slots=True)
class NextTask:
    """A task of which no group is open yet at the step in question."""

    task: str
    needed_tokens: int


@dataclass(frozen=True, slots=True)
class Share:
    """Samples of one group, or of one task whose group is to be opened (then `group` is None)."""

    group: str | None
    task: str
    samples: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The samples to lease to the node."""

    step: int
    continued: tuple[Share, ...]
    opened: tuple[Share, ...]

    @property
    def shares(self) -> tuple[Share, ...]:
        """All that it leases."""
        return self.continued + self.opened

    @property
    def rollouts(self) -> int:
        """How many samples it leases."""
        return sum(len(share.samples) for share in self.shares)


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing for this node, and why."""

    reason: str


def assign(
    now: float,
    latest: int,
    node: Asker,
    open_samples: Iterable[OpenSamples],
    groups_now: int,
    next_tasks: Callable[[int], Iterable[NextTask]],
    settings: AssignSettings,
) -> Plan | Wait:
    """Choose what to lease to `node`.

    `latest` is the last committed step, `groups_now` how many groups are in progress or wait to be trained on, and
    `next_tasks(step)` yields the tasks not yet opened at a step in the order of `task_order`; one that does not fit
    this node is skipped and left for another.
    """
    size = min(node.most or settings.lease_rollouts, max(node.free_slots, settings.lease_minimum))
    if node.free_slots < 1 or size < 1:
        return Wait("the node has no free slot")
    candidates = [candidate for candidate in open_samples if _is_candidate(candidate, now, latest, node, settings)]
    headroom = max(0, settings.groups_ahead - groups_now)
    for step in _candidate_steps(candidates, latest, node, settings):
        continued = _continue(candidates, step, size)
        size_left = size - sum(len(share.samples) for share in continued)
        is_openable = headroom > 0 and 0 <= latest - step <= settings.max_lag
        opened = _open(next_tasks(step), node, size_left, headroom, settings) if is_openable and size_left else ()
        if continued or opened:
            return Plan(step, continued, opened)
    return Wait(_why(node, groups_now, settings))


def is_fresh(step: int, latest: int, max_staleness: int) -> bool:
    """Whether work at `step` is worth starting.

    A rollout of step s may train the update that starts from step S if S − s ≤ max_staleness. One more step will
    probably be committed while it is generated, hence `<`; but a run on the latest step alone must still get work.
    """
    return 0 <= latest - step < max(1, max_staleness)


def _is_candidate(candidate: OpenSamples, now: float, latest: int, node: Asker, settings: AssignSettings) -> bool:
    is_due = candidate.reissued_at is None or candidate.reissued_at <= now
    fits = candidate.needed_tokens <= node.max_context
    is_its_own = node.node in candidate.not_for
    is_there = bool(candidate.samples) and is_fresh(candidate.step, latest, settings.max_staleness)
    return is_there and is_due and fits and not is_its_own


def _candidate_steps(
    candidates: Sequence[OpenSamples], latest: int, node: Asker, settings: AssignSettings
) -> list[int]:
    """The steps to try, best first, without repetition."""
    home = _home(latest, node, settings)
    urgent = {
        candidate.step for candidate in candidates if candidate.reissued_at is not None or candidate.step < latest
    }
    others = {candidate.step for candidate in candidates}
    ordered = [
        *sorted(urgent, key=lambda step: (step != node.loaded, step)),
        home,
        latest,
        *sorted(others, reverse=True),
    ]
    return list(dict.fromkeys(ordered))


def _home(latest: int, node: Asker, settings: AssignSettings) -> int:
    if node.loaded is None or not is_fresh(node.loaded, latest, settings.max_staleness):
        return latest
    return node.loaded if latest - node.loaded <= settings.max_lag else latest


def _continue(candidates: Sequence[OpenSamples], step: int, size: int) -> tuple[Share, ...]:
    """Up to `size` open samples of a step, those open again first, longest waiting first; one share per group."""
    ranked = sorted((candidate for candidate in candidates if candidate.step == step), key=_rank)
    chosen: dict[tuple[str, str], list[int]] = {}
    for candidate in ranked:
        if size < 1:
            break
        taken = sorted(candidate.samples)[:size]
        chosen.setdefault((candidate.group, candidate.task), []).extend(taken)
        size -= len(taken)
    return tuple(Share(group, task, tuple(sorted(samples))) for (group, task), samples in chosen.items())


def _rank(candidate: OpenSamples) -> tuple[bool, float, str, tuple[int, ...]]:
    return (candidate.reissued_at is None, candidate.reissued_at or 0.0, candidate.group, candidate.samples)


def _open(
    tasks: Iterable[NextTask], node: Asker, size: int, headroom: int, settings: AssignSettings
) -> tuple[Share, ...]:
    """New groups until the lease is full; the last one may be left to others in part."""
    opened: list[Share] = []
    for _, task in zip(range(SCAN_TASKS), tasks, strict=False):
        if task.needed_tokens > node.max_context:
            continue
        count = min(size, settings.group_size)
        opened.append(Share(None, task.task, tuple(range(count))))
        size -= count
        if size < 1 or len(opened) >= headroom:
            break
    return tuple(opened)


def _why(node: Asker, groups_now: int, settings: AssignSettings) -> str:
    if settings.groups_ahead == 0:
        return "the last step has its batch: no further groups are wanted"
    if groups_now >= settings.groups_ahead:
        return f"{groups_now} groups are in progress or wait for the trainer, {settings.groups_ahead} are wanted"
    return f"no open sample or unopened task fits a context of {node.max_context} tokens"


# --- the order of tasks ----------------------------------------------------------------------------------------------

ROUNDS = 8
"""Four make a Feistel network a strong pseudo-random permutation (Luby and Rackoff 1988); small domains want more."""


def task_order(step_secret: bytes, step: int, count: int, start: int = 0) -> Iterator[int]:
    """Yield the indices 0 … count − 1 from position `start` on, shuffled by the step's secret, each exactly once.

    No task comes twice in a step: its samples would have the same seeds, and so the same text.
    """
    key = task_key(step_secret)
    return (_place(key, step, count, position) for position in range(start, count))


def _place(key: bytes, step: int, count: int, position: int) -> int:
    """Cycle-walk (Black and Rogaway 2002): permute a power of four ≥ count until the value is below count.

    That domain is less than four times too large, so four walks are needed on average at most.
    """
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    value = _permute(key, step, half_bits, position)
    while value >= count:
        value = _permute(key, step, half_bits, value)
    return value


def _permute(key: bytes, step: int, half_bits: int, value: int) -> int:
    """A balanced Feistel network over 2·half_bits bits: (L, R) ← (R, L ⊕ F(round, R))."""
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (_mix(key, step, number, right) & mask)
    return left << half_bits | right


@lru_cache(maxsize=1 << 15)
def _mix(key: bytes, step: int, number: int, half: int) -> int:
    """F of one round. A half has few values, 512 for 262,144 tasks, and each is asked for over and over."""
    return int.from_bytes(derive(key, "task order", step, number, half)[:8], "big")
