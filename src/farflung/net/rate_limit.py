"""Rate limits: token buckets by key and by address. Pure, but for the middleware at the end.

A bucket holds up to `burst` requests and fills by `per_s`; a request that finds it empty is told how long to wait. Each
process counts for itself. The buckets of the latest senders are kept; a new bucket is full, so forgetting one only
forgives.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv6Address, ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

from farflung.net.server import problem_response
from farflung.protocol.errors import Busy

MOST = 100_000
"""Senders remembered: some 20 MB."""


class Buckets:
    """One bucket for every sender; a rate of 0 is no limit."""

    def __init__(self, per_s: float, burst: float, *, what: str, most: int = MOST) -> None:
        self.per_s, self.burst, self.what, self.most = per_s, max(1.0, burst), what, most
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Sender → requests left, and when that was so."""

    def take(self, sender: str, now: float) -> None:
        """Count one request. Raises Busy, with the seconds after which there is room for one."""
        if self.per_s <= 0:
            return
        left, then = self._left.pop(sender, (self.burst, now))
        left = min(self.burst, left + max(0.0, now - then) * self.per_s)
        is_let_in = left >= 1
        self._left[sender] = (left - 1 if is_let_in else left, now)
        if len(self._left) > self.most:
            self._left.popitem(last=False)
        if not is_let_in:
            raise Busy(
                f"{self.what} {sender} asks more than {self.per_s:g} times a second; slow down",
                retry_after_s=(1 - left) / self.per_s,
            )


@lru_cache(maxsize=4096)
def sender_of(host: str) -> str:
    """The unit that counts as one address: an IPv4 address, or the /64 that a machine with IPv6 can choose from."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host[:80]
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(IPv6Address(int(address) >> 64 << 64)) + "/64"


class ByAddress:
    """Middleware that counts every request by where it comes from, before anything of it is looked at."""

    def __init__(self, app: ASGIApp, buckets: Buckets, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._buckets, self._clock = app, buckets, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with 429, or pass it on."""
        if scope["type"] == "http" and scope.get("client"):
            try:
                self._buckets.take(sender_of(scope["client"][0]), self._clock())
            except Busy as error:
                await problem_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
