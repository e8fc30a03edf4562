"""Connections of strangers: so many an address, and no longer than it takes to say what they want.

uvicorn waits without end for the first request of a connection, and for the rest of its head.
"""

import asyncio
from collections import Counter
from collections.abc import Collection
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from farflung.net.rate_limit import sender_of

HEAD_S = 15.0
"""Seconds from the opening of a connection, or from the first byte after an answer, to the end of a request's head."""
FULL, LATE = (
    b"HTTP/1.1 %s\r\nconnection: close\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n" % status
    for status in (b"429 Too Many Requests", b"408 Request Timeout")
)


def guarded(most_per_address: int, proxies: Collection[str] = ()) -> type[HttpToolsProtocol]:
    """A protocol for `uvicorn.Config(http=…)`. Addresses in `proxies` speak for others and may have any number; 0 is no
    limit."""
    counts = Counter[str]()

    def is_over(sender: str) -> bool:
        return 0 < most_per_address < counts[sender] and sender not in proxies and "*" not in proxies

    class Guarded(HttpToolsProtocol):
        _sender = ""
        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._sender = sender_of(self.client[0]) if self.client else ""
            counts[self._sender] += 1
            self._be_patient()
            if is_over(self._sender):
                self._hang_up(FULL)

        def connection_lost(self, exc: Exception | None) -> None:
            self._be_content()
            counts[self._sender] -= 1
            if counts[self._sender] <= 0:
                del counts[self._sender]
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            is_between = self.cycle is None or self.cycle.response_complete
            if is_between and self._patience is None and not self.transport.is_closing():
                self._be_patient()

        def on_headers_complete(self) -> None:
            self._be_content()
            super().on_headers_complete()

        def _be_patient(self) -> None:
            self._patience = self.loop.call_later(HEAD_S, self._hang_up, LATE)

        def _be_content(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

        def _hang_up(self, answer: bytes) -> None:
            self.transport.write(answer)
            self.transport.close()

    return Guarded
