"""A relay beside a worker with an open port, in one process. Each has a key of its own."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from farflung.config import RelaySection
from farflung.protocol.errors import FarflungError
from farflung.protocol.identity import Key
from farflung.relay import Relay

log = logging.getLogger(__name__)
STOP_S = 10.0


@contextmanager
def relay_beside(
    url: str, folder: Path, settings: RelaySection, *, run: str, root: bytes | None, name: str
) -> Iterator[str]:
    """A relay in a thread for as long as the block lasts; gives its address on this machine, to fetch weights from."""
    place = folder / "relay"
    place.mkdir(parents=True, exist_ok=True)
    relay = Relay(
        url, Key.load_or_make(place / "key"), place, settings, run=run, root=root, name=name and f"{name}-relay"
    )
    thread = threading.Thread(target=_serve, args=(relay,), name="relay", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{settings.port}"
    finally:
        relay.stop()
        thread.join(STOP_S)


def _serve(relay: Relay) -> None:
    try:
        asyncio.run(relay.run())
    except FarflungError as error:
        log.error("no relay here because=%s", error)  # the worker works without
