"""A coordinator of the tests on a socket, in a thread of its own, at the time of day."""

import asyncio
import threading
import time

import uvicorn
from tests.conftest import Clock, House, named

from farflung.net.client import Client
from farflung.net.server import listen


class Now(Clock):
    """The time of day, which a test may move."""

    def __call__(self) -> float:
        return time.time() + self.now - Clock.now


class Served:
    """A house that answers at `url`."""

    def __init__(self, house: House) -> None:
        self.house = house
        house.clock = house.ctx.clock = Now()
        listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        options = uvicorn.Config(house.app, log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(options)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve(sockets=[listener])))
        self._thread.start()
        # Over the socket, for what polls there waits on that thread's event loop.
        house.line = lambda name: Client(self.url, named(name), house.ctx.run_ctx.key.id, clock=house.clock)

    def close(self) -> None:
        """Stop serving."""
        self._server.should_exit = True
        self._thread.join()
