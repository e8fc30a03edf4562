"""Allocation while nodes take their parts of the candidates one after the other. No SQL, no clock, no randomness.

`assign.py` chooses for one node; here the next one finds what the one before left over.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from farflung.tasks.assign import Asker, AssignSettings, NextTask, OpenSamples, Plan, Share, Wait, assign


class Allocator:
    """Open samples, groups in progress, and tasks that are next at each step.

    `next_tasks(step)` yields the tasks not opened at a step when the allocator was filled, `new_group` gives ids.
    """

    def __init__(
        self,
        latest: int,
        open_samples: Iterable[OpenSamples],
        groups_now: int,
        next_tasks: Callable[[int], Iterable[NextTask]],
        new_group: Callable[[], str],
        settings: AssignSettings,
    ) -> None:
        self.latest, self.groups_now, self.settings = latest, groups_now, settings
        self._open = list(open_samples)
        self._new_group, self._sources = new_group, _Sources(next_tasks)

    def take(self, node: Asker, now: float) -> Plan | Wait:
        """The samples that this node is leased; groups that are opened for it have their ids."""
        plan = assign(now, self.latest, node, self._open, self.groups_now, self._sources.left, self.settings)
        if isinstance(plan, Wait):
            return plan
        opened = tuple(replace(share, group=self._new_group()) for share in plan.opened)
        self._take_down(plan.continued)
        for share in opened:
            self._put_back(plan.step, share)
        self.groups_now += len(opened)
        return replace(plan, opened=opened)

    def _take_down(self, shares: Iterable[Share]) -> None:
        for share in shares:
            self._open = [left for offer in self._open if (left := _less(offer, share)).samples]

    def _put_back(self, step: int, share: Share) -> None:
        """The rest of a new group is open to the next node."""
        task = self._sources.pop(step, share.task)
        left = tuple(sample for sample in range(self.settings.group_size) if sample not in share.samples)
        if left:
            self._open.append(OpenSamples(str(share.group), share.task, step, left, task.needed_tokens))


class _Sources:
    """Tasks that are not opened yet at each step, each looked up once."""

    def __init__(self, next_tasks: Callable[[int], Iterable[NextTask]]) -> None:
        self._next_tasks = next_tasks
        self._seen: dict[int, dict[str, NextTask]] = {}
        self._more: dict[int, Iterator[NextTask]] = {}

    def left(self, step: int) -> Iterator[NextTask]:
        """Those that are left of what was looked up, then others."""
        if step not in self._more:
            self._seen[step], self._more[step] = {}, iter(self._next_tasks(step))
        yield from list(self._seen[step].values())
        for task in self._more[step]:
            self._seen[step][task.task] = task
            yield task

    def pop(self, step: int, task: str) -> NextTask:
        """This one is opened."""
        return self._seen[step].pop(task)


def _less(offer: OpenSamples, share: Share) -> OpenSamples:
    if offer.group != share.group:
        return offer
    return replace(offer, samples=tuple(sample for sample in offer.samples if sample not in share.samples))
