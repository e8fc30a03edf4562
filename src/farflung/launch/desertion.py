"""Whether an embedded run still gets anywhere once all of its own workers are gone, and how they left. Pure."""

from collections.abc import Mapping

from farflung.protocol.messages import NodeView, Status

Done = tuple[str, int, int, int]
"""A run's status, its step, rollouts accepted and audits done: what changes while anything happens."""
NOTHING: Done = ("", 0, 0, 0)


class Desertion:
    """Since when nothing has happened in a run without workers of its own."""

    def __init__(self) -> None:
        self._done, self._since_s = NOTHING, 0.0

    def still_s(self, own: set[str], gone: Mapping[str, str], status: Status, now_s: float) -> float | None:
        """Seconds in which nothing has happened; None where something has, or may still come.

        `own` are the names of the run's workers, `gone` those that do not come back with the reason.
        """
        if not own or own - gone.keys() or any(map(_is_at_work, status.nodes)) or status.status != "running":
            self._done = NOTHING
            return None
        done = status.status, status.latest.step, status.accepted, status.audits.get("done", 0)
        if done != self._done:
            self._done, self._since_s = done, now_s
            return None
        return now_s - self._since_s


def how_they_left(own: set[str], gone: Mapping[str, str], status: Status) -> str:
    """Each worker with its reason; a reason that several have is told once."""
    names = {node.node: node.name for node in status.nodes}
    ejected = {names.get(one.node, ""): one.reason for one in status.verdicts if one.outcome == "eject"}
    why: dict[str, list[str]] = {}
    for name in sorted(own):
        text = f"ejected ({ejected[name]})" if name in ejected else gone[name]
        why.setdefault(text, []).append(name)
    return "; ".join(f"{', '.join(who)}: {text}" for text, who in why.items())


def _is_at_work(node: NodeView) -> bool:
    """Whether something may still come of it: of a worker that is there, or of a role that does more than wait."""
    if node.role == "worker":
        return node.is_online and node.status != "ejected" and node.phase != "gone"
    return node.is_online and node.role != "relay" and node.phase not in ("waiting", "gone", "")
