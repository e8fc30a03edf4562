"""Lifecycles: for each noun a table of legal changes of status, and one check; no SQL, no clock.

A replay comes before a score: a drawn rollout is `held` until its replay passed, so text that fails is never scored.

    rollout  leased ─┬─▶ received ──▶ accepted ──▶ batched ──▶ trained
                     ├─▶ held ─▶ (received, accepted)                    + expired, rejected, void, dropped
                     └─▶ expired
             accepted, batched ──▶ held: its node came under suspicion, or the trainer's tripwire
    lease    open ──▶ submitted | returned | expired | void
    group    open ⇄ complete ──▶ batched ──▶ trained                     + dropped
    step     open ──▶ committed
    node     probation ⇄ trusted, either ──▶ quarantined ──▶ ejected
    audit    open ⇄ claimed ──▶ done                                     + cancelled
    run      running ──▶ finishing ──▶ finished ──▶ (running)
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from farflung.protocol.errors import IllegalTransition

Lifecycle = Mapping[str, tuple[str, ...]]
"""Status → the statuses that may follow it. The first key is where a life begins."""

_ROLLOUT: Lifecycle = {
    "leased": ("received", "held", "expired"),  # expired: the lease lapsed, was handed back or was voided
    "received": ("accepted", "held", "rejected", "void", "dropped"),  # waits for a score; rejected: no scorer can
    "held": ("received", "accepted", "rejected", "void", "dropped"),  # waits for a replay; accepted: was scored before
    "accepted": ("batched", "held", "void", "dropped"),  # dropped: no variance, stale, or its group stayed incomplete
    "batched": ("trained", "held", "accepted"),  # back only if the tripwire took its group out of the batch
    "expired": (),
    "rejected": (),  # its own replay failed, or it was not replayed and no scorer could judge it
    "void": (),  # a verdict on its submission or its node, not on itself
    "dropped": (),
    "trained": (),
}
_LEASE: Lifecycle = {
    "open": ("submitted", "returned", "expired", "void"),
    "submitted": (),
    "returned": (),  # handed back by a node that drains
    "expired": (),
    "void": (),
}
_GROUP: Lifecycle = {
    "open": ("complete", "dropped"),
    "complete": ("open", "batched", "dropped"),  # open again: a verdict voided one of its accepted rollouts
    "batched": ("trained", "open"),  # open again: the tripwire took one of its rollouts out
    "trained": (),
    "dropped": (),
}
_STEP: Lifecycle = {"open": ("committed",), "committed": ()}  # open: its batch is claimed
_NODE: Lifecycle = {
    "probation": ("trusted", "quarantined", "ejected"),
    "trusted": ("probation", "quarantined", "ejected"),
    "quarantined": ("probation", "ejected"),  # probation: the confirming prefill did not confirm
    "ejected": (),
}
_AUDIT: Lifecycle = {
    "open": ("claimed", "cancelled"),
    "claimed": ("done", "open", "cancelled"),  # open: the validator's claim expired
    "done": (),
    "cancelled": (),
}
_RUN: Lifecycle = {
    "running": ("finishing",),
    "finishing": ("finished",),  # the last step is committed; its evaluation and the ledger are not closed
    "finished": ("running",),  # resumed with more steps
}

LIFECYCLES: Final[Mapping[str, Lifecycle]] = MappingProxyType(
    {"rollout": _ROLLOUT, "lease": _LEASE, "group": _GROUP, "step": _STEP, "node": _NODE, "audit": _AUDIT, "run": _RUN}
)
"""Every noun with a life, and its table."""

REOPENING: Final = frozenset({"expired", "rejected", "void"})
"""Rollout statuses that leave the sample open, to be leased again while it is fresh.

`dropped` is not one of them: the seed would give the same text, as stale or as impossible to score as before."""


def statuses(noun: str) -> tuple[str, ...]:
    """Every status of a noun, the first one first; what the CHECK of its table lists."""
    return tuple(LIFECYCLES[noun])


def first(noun: str) -> str:
    """The status in which a noun comes to life."""
    return statuses(noun)[0]


def is_legal(noun: str, before: str, after: str) -> bool:
    """Whether a noun may go from one status straight to another. Staying is not a change, and so not legal."""
    return after in LIFECYCLES[noun].get(before, ())


def check(noun: str, id: str, before: str, after: str, story: Iterable[str] = ()) -> str:
    """Return `after` if this change is legal.

    Raises IllegalTransition, whose message tells what was tried, what would be legal and what happened before.
    `story` are the recent events of this id, oldest first.
    """
    if is_legal(noun, before, after):
        return after
    raise IllegalTransition(
        f"{noun} {id} cannot go from {before!r} to {after!r}; {_legal(noun, before)}; its story: {_story_text(story)}"
    )


def _legal(noun: str, before: str) -> str:
    following = LIFECYCLES[noun].get(before)
    if following is None:
        return f"{before!r} is no status of a {noun}, which has: {', '.join(statuses(noun))}"
    return f"from {before!r} it may go to: {', '.join(following)}" if following else f"{before!r} is final"


def _story_text(story: Iterable[str]) -> str:
    return " → ".join(story) or "no events"
