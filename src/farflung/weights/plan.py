"""Plan to a wanted version: from an anchor or a version at hand, by the deltas since. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from farflung.protocol.messages import Manifest, Shard

Link = tuple[str, Manifest]
"""A manifest and its digest."""


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """How to come to a version."""

    start: Link
    """Where to start: a version at hand, or an anchor."""
    is_held: bool
    """Whether the start is at hand, so that its shards are not needed."""
    steps: tuple[Link, ...]
    """The versions whose deltas lead on from there, oldest first; the last is the one that is wanted."""

    @property
    def is_put_together(self) -> bool:
        """Whether the version is made of what is fetched, by differences or adapters, rather than fetched itself."""
        return bool(self.steps) or bool(self.start[1].adapters and not self.is_held)

    @property
    def last(self) -> Link:
        """The version that is wanted."""
        return self.steps[-1] if self.steps else self.start

    @property
    def shards(self) -> list[Shard]:
        """All that must be fetched unless it is here."""
        whole = [] if self.is_held else self.start[1].shards
        return [*whole, *(shard for _, manifest in self.steps for shard in manifest.deltas)]

    @property
    def size_bytes(self) -> int:
        """Bytes of those."""
        return sum(shard.size_bytes for shard in self.shards)


def best_plan(lineage: Sequence[Link], is_held: Callable[[str], bool]) -> FetchPlan | None:
    """The plan with the fewest bytes along a chain that leads from the wanted version back to its ancestors."""
    plans: list[FetchPlan] = []
    for index, (digest, manifest) in enumerate(lineage):
        steps = tuple(reversed(lineage[:index]))
        if is_held(digest):
            plans.append(FetchPlan((digest, manifest), True, steps))
        if manifest.shards:
            plans.append(FetchPlan((digest, manifest), False, steps))
        if not manifest.deltas:
            break
    return min(plans, key=lambda plan: plan.size_bytes, default=None)


def wants_more(lineage: Sequence[Link], is_held: Callable[[str], bool], *, may_hold: bool) -> str:
    """Digest of the manifest to look at next, empty when nothing further back can be a better plan.

    Beyond an anchor only a version at hand can be better, so without any (`may_hold`) the walk ends there.
    """
    digest, last = lineage[-1]
    best = best_plan(lineage, is_held)
    if not last.deltas or is_held(digest) or (best is not None and not may_hold):
        return ""
    passed = sum(manifest.delta_bytes for _, manifest in lineage)
    return "" if best is not None and best.size_bytes <= passed else last.parent
