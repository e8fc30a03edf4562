"""One key at work on two machines: the coordinator sees it by the heartbeats, which each process marks with its start.

A machine of several devices has a process for each, which says which one it is.

A process that is started again takes the place of the one before, for good. Where the one before comes back, both live:
they do each piece of work twice, for one pay. Both are told, now and then, instead of an answer to a heartbeat.
"""

import logging
from collections import OrderedDict
from dataclasses import dataclass, field

from farflung.protocol.errors import Conflict
from farflung.protocol.messages import Heartbeat

log = logging.getLogger(__name__)
MOST_NODES = 10_000
"""Nodes that are remembered; a flood of keys makes others forgotten, which costs a warning."""
LASTS_S, TOLD_EVERY_S = 60.0, 60.0


@dataclass
class _Lives:
    """When the two last processes of a node started, when they were last seen in turn, and when each was told."""

    now: float
    before: float = -1.0
    met_at: float = -LASTS_S
    said_at: dict[float, float] = field(default_factory=dict[float, float])


class Twins:
    """The traces of each node that this coordinator has seen."""

    def __init__(self) -> None:
        self._lives: OrderedDict[tuple[str, int], _Lives] = OrderedDict()

    def check(self, node: str, heartbeat: Heartbeat, at: float) -> None:
        """Raises Conflict, once in a while, for each of two processes that share a key."""
        if heartbeat.phase == "gone":  # the last word of one that is replaced may come late
            return
        lives = self._lives.setdefault((node, heartbeat.device), _Lives(heartbeat.started_at))
        self._lives.move_to_end((node, heartbeat.device))
        if len(self._lives) > MOST_NODES:
            self._lives.popitem(last=False)
        if heartbeat.started_at != lives.now:
            if heartbeat.started_at == lives.before:
                lives.met_at = at
            lives.now, lives.before = heartbeat.started_at, lives.now
        told_at = lives.said_at.get(heartbeat.started_at, at - TOLD_EVERY_S)
        if at - lives.met_at < LASTS_S and at - told_at >= TOLD_EVERY_S:
            lives.said_at = {
                start: lives.said_at[start] for start in (lives.now, lives.before) if start in lives.said_at
            }
            lives.said_at[heartbeat.started_at] = at
            log.warning("node %s works in two places at once", node)
            raise Conflict(
                f"the key of node {node} is in use in two places at once, so work is done twice and paid once; end one "
                "of them, or give it a folder, and so a key, of its own"
            )
