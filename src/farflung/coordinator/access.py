"""Access control of a coordinator: the role that each request needs, and how often it may come."""

import logging
import math
import socket
import time
from collections.abc import Mapping

from starlette.types import ASGIApp

from farflung.config import CoordinatorSection
from farflung.net.admin import bears
from farflung.net.bodies import Bodies
from farflung.net.hosts import ANY, KnownHosts
from farflung.net.rate_limit import Buckets, ByAddress
from farflung.net.server import Call
from farflung.protocol.errors import Forbidden

log = logging.getLogger(__name__)


class AccessControl:
    """Roles that the operator granted, the operator's token, and rates."""

    def __init__(self, roles: Mapping[str, str], own: str, admin_token: str, limits: CoordinatorSection) -> None:
        """`roles` by node; `own` is the coordinator's node id."""
        self.roles, self._own, self._admin_token = roles, own, admin_token
        self._hosts = _hosts(limits)
        self._by_key, self._by_address = (
            Buckets(per_s, per_s * limits.rate_burst_s, what=what)
            for per_s, what in ((limits.rate_per_key, "node"), (limits.rate_per_address, "address"))
        )
        self.bodies = Bodies(limits.bodies_mb * 1e6 or math.inf, self.roles.__contains__)

    def require(self, call: Call, role: str) -> None:
        """Raises Forbidden for a node that was not granted this role."""
        if self.roles.get(call.node) != role:
            raise Forbidden(f"this route is for the role {role!r}, which node {call.node} is not granted")

    def require_operator(self, call: Call) -> None:
        """Operators have the token or, in a run without one, sign with the coordinator's own key. Raises Forbidden."""
        if self._admin_token:
            if not bears(call.request.headers.get("authorization", ""), self._admin_token):
                log.warning("admin refused node=%s path=%s", call.node, call.request.scope["path"])
                raise Forbidden("this route is for the operator: send the admin token, Authorization: Bearer TOKEN")
            return
        if call.node != self._own:
            raise Forbidden("this route is for the operator: sign with the coordinator's own key")

    def count(self, node: str) -> None:
        """One request more of a node. Raises Busy, but for the operator's own roles, which have a whole run's work."""
        if node not in self.roles:
            self._by_key.take(node, time.monotonic())

    def before(self, app: ASGIApp) -> ASGIApp:
        """The app behind the limit by address, and answering to its own names alone."""
        return ByAddress(KnownHosts(app, self._hosts, "coordinator.hosts"), self._by_address)


def _hosts(settings: CoordinatorSection) -> tuple[str, ...]:
    """The names a coordinator answers to besides addresses: a certificate and a proxy have a list of their own."""
    if not settings.hosts and (settings.tls_cert or settings.proxies):
        return (ANY,)
    return (*settings.hosts, settings.host, socket.gethostname())
