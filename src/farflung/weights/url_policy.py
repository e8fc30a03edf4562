"""Worker, validator and relay: is a relay's address one that this node should ask?

A relay registers any address that it likes. A node that asked them all could be made to knock, from within, at machines
of its own network that no stranger reaches. So addresses that are not public are asked only in a run whose coordinator
has such an address itself: on one machine, or in one network. A name may come to mean another machine between the check
and the request; a request then still asks only for a path of digests.
"""

import asyncio
import ipaddress
import socket
from urllib.parse import urlsplit

from farflung.protocol.errors import ConfigError


async def check_url(url: str, coordinator: str) -> None:
    """Raise ConfigError if a stranger's address leads inside and the coordinator's does not, or has no machine."""
    if await _is_inside(url) and not await _is_inside(coordinator):
        raise ConfigError(
            f"{url[:200]!r} is inside a private network, and a run in the open must not send nodes there; "
            "a relay for this run needs a public address"
        )


async def _is_inside(url: str) -> bool:
    return not all(address.is_global for address in await _addresses(url))


async def _addresses(url: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """All that a host's name stands for; a name that stands for one machine inside is inside."""
    try:
        host = urlsplit(url).hostname or ""
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:  # UnicodeError, of a label that is too long, is a ValueError
        raise ConfigError(f"no machine is called {url[:200]!r}: {error}") from error
    return [_plain(ipaddress.ip_address(str(one[4][0]).partition("%")[0])) for one in found]


def _plain(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An IPv4 address that is written as IPv6 is judged as IPv4."""
    return getattr(address, "ipv4_mapped", None) or address
