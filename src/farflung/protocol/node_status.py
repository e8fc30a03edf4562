"""A node's status as its owner is told of it: what happened, what follows, what to do; each verdict once.

The coordinator tells it with every heartbeat, so that no owner learns by silence that the node's work is void.
"""

import logging

from farflung.protocol.messages import HeartbeatReply, Ruling

log = logging.getLogger(__name__)

HAPPENED = {
    "void": "submission {submission} of this node is void: {reason}",
    "quarantine": "this node is in quarantine since submission {submission}: {reason}",
    "eject": "this node is ejected: {reason}",
    "release": "this node is out of quarantine, a second opinion did not confirm the first: {reason}",
}
FOLLOWS = {
    "void": "nothing of it is paid, and the node is on probation",
    "quarantine": "it gets no work until a second opinion ejects or releases it",
    "eject": "its work is no longer taken and its escrow is burned",
    "release": "it goes on, on probation",
}
ADVICE = {
    "void": "if it computes honestly, look with `farflung doctor` whether its arithmetic fits the profile it picked",
    "quarantine": "leave it running, and look with `farflung doctor` whether its arithmetic fits the profile it picked",
    "eject": "if it computed honestly, `farflung doctor` may show why, `farflung story` has the verdict",
    "release": "nothing is to be done",
}


class NodeStatus:
    """The coordinator's last word on a node."""

    def __init__(self) -> None:
        self.status, self._clean, self._needed = "", 0, 0
        self._told: dict[int, str] = {}
        """Verdicts that the owner knows of, and the reason that was given."""

    @property
    def is_ejected(self) -> bool:
        """Whether nothing is left to do here."""
        return self.status == "ejected"

    def __str__(self) -> str:
        if self.status == "probation" and self._needed:
            return f"on probation, {self._clean} of {self._needed} clean rollouts"
        return {"quarantined": "in quarantine, waiting for a second opinion"}.get(self.status, self.status)

    def hear(self, reply: HeartbeatReply) -> None:
        """Take in what a heartbeat was answered, and tell the owner what is new in it."""
        before, self.status = self.status, reply.status
        self._clean, self._needed = reply.clean, reply.needed
        rulings = reply.rulings if before else reply.rulings[-1:]  # of what was before this stay, the last word alone
        self._told |= {ruling.id: "" for ruling in reply.rulings[: len(reply.rulings) - len(rulings)]}
        for ruling in rulings:
            self._tell(ruling)
        if reply.status != before and reply.needed:
            log.info("status=%r before=%r", str(self), before)

    def _tell(self, ruling: Ruling) -> None:
        known = self._told.get(ruling.id)
        if known is None:
            log.warning("%s", sentences(ruling))
        elif known and known != ruling.reason:
            log.info("why submission=%s was judged %s: %s", ruling.submission[:12], ruling.outcome, ruling.reason)
        self._told[ruling.id] = ruling.reason


def sentences(ruling: Ruling) -> str:
    """A verdict in words: what happened; what follows; what to do."""
    happened = HAPPENED[ruling.outcome].format(submission=ruling.submission[:12], reason=ruling.reason)
    return f"{happened}; {FOLLOWS[ruling.outcome]}; {ADVICE[ruling.outcome]}"
