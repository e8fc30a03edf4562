"""Who waits at a coordinator that leaves is let go at once."""

import asyncio
import time

from farflung.coordinator.long_poll import WaitQueue


def test_nobody_waits_at_a_closed_queue():
    async def scenario() -> None:
        queue = WaitQueue()
        waiting = [asyncio.create_task(queue.wait(30)) for _ in range(3)]
        await asyncio.sleep(0)
        queue.close()
        assert await asyncio.gather(*waiting) == [False] * 3
        assert not await queue.wait(30)

    before = time.monotonic()
    asyncio.run(scenario())
    assert time.monotonic() - before < 5
