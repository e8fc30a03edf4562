"""Names that a server answers to: a stranger's page may point its own name here (DNS rebinding), and read.

A browser then sends that name as Host. Names that no stranger can point anywhere are let in: addresses in digits, names
without a dot, localhost. Other names are those that the operator listed.
"""

import ipaddress
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from farflung.net.server import problem_response
from farflung.protocol.errors import Misdirected

ANY = "*"


class KnownHosts:
    """An application that answers only where it is asked by a name it has."""

    def __init__(self, app: ASGIApp, names: Iterable[str], setting: str = "") -> None:
        """`setting` is where an operator lists names, for the refusal."""
        self._app, self._names = app, frozenset(name.lower().rstrip(".") for name in names)
        self._setting = setting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it before anything of it is read."""
        host = _host(scope) if scope["type"] == "http" and ANY not in self._names else ""
        if is_known(host, self._names):
            await self._app(scope, receive, send)
            return
        await problem_response(Misdirected(self._refusal(host)))(scope, receive, send)

    def _refusal(self, host: str) -> str:
        listed = f", or add the name to {self._setting}" if self._setting else ""
        return f"this is not {host[:100]!r}: use the address in digits{listed}"


def url_of(scheme: str, host: str, port: int) -> str:
    """The URL of a server that listens on a host; an IPv6 address stands in brackets there."""
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def is_known(host: str, names: frozenset[str] = frozenset()) -> bool:
    """Whether a Host header, port and all, names this server; an empty one does, for no browser leaves it out."""
    name = _without_port(host)
    return not name or name in names or name.endswith(".localhost") or _is_address(name) or _is_plain(name)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there; of a name nothing but localhost is sure."""
    name = _without_port(host) if host.count(":") < 2 else host
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name.strip("[]")).is_loopback)


def _host(scope: Scope) -> str:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")


def _without_port(host: str) -> str:
    name, colon, port = host.strip().lower().rpartition(":")
    return (name if colon and "]" not in port else host.strip().lower()).rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _is_plain(name: str) -> bool:
    """A name of the local network, such as the one of a container: no public name is without a dot."""
    return name.replace("-", "").replace("_", "").isalnum() and name.isascii()
