"""Sweep of a coordinator, by the clock: lapsed leases come back, a run that is done ends, metrics are written."""

import asyncio
import logging
import math
import random
import time
from functools import partial

from sqlalchemy import Connection

from farflung.audits.unused import drop_groups
from farflung.coordinator.context import Context
from farflung.protocol import messages as m
from farflung.queries import evals
from farflung.rollouts import blob_gc, commit
from farflung.store.transitions import last_event
from farflung.tasks import lease, node_gc

log = logging.getLogger(__name__)
SWEEP_S = 0.25
DEAF_S = 1.0
"""A sweep so late says that this process was frozen or its database away, so that silence was no node's fault."""
STRANDED_S = 1.0
TIDY_S, UNREFERENCED_S = 900.0, 3600.0


class Sweeper:
    """Sweeps and tidies for as long as its coordinator stays."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._started_at = ctx.clock()
        self.swept_at, self._listening_since = math.inf, ctx.clock()
        """When the last sweep went through, and since when none was late and every commit went through."""
        self._failures, self._stranded_at = 0, 0.0
        self._noted = set[int]()
        """Policy steps whose evaluation has its line in metrics.jsonl."""

    async def sweep(self) -> None:
        """For ever: take lapsed leases back, end the run when it is done, write metrics."""
        while True:
            try:
                await self.note_evals()
                self._ctx.long_poll.wake_if_due(await self._ctx.database.write(self.sweep_once), time.monotonic())
                self.swept_at = self._ctx.clock()
                own = m.Heartbeat(cpu_s=time.process_time(), started_at=self._started_at)
                self._ctx.metrics.note_node(
                    self._ctx.run_ctx.key.id, "coordinator", self._started_at, own, self._ctx.clock()
                )
                self._ctx.metrics.flush(self._ctx.clock())
            except Exception:
                log.exception("sweep failed, going on")  # without a sweep no lease would ever lapse
            await asyncio.sleep(SWEEP_S)

    def sweep_once(self, connection: Connection) -> int:
        """Gives the number of the last event."""
        now = self._ctx.clock()
        if now - self.swept_at > DEAF_S or self._ctx.database.failures != self._failures:
            self._listening_since, self._failures = now, self._ctx.database.failures
        lease.expire(connection, self._ctx.run_ctx, now, self._listening_since)
        if now - self._stranded_at > STRANDED_S:
            self._stranded_at = now
            why = "every node at work handed in a sample of it before"
            run_ctx = self._ctx.run_ctx
            drop_groups(connection, run_ctx, lease.stranded(connection, run_ctx, now), now, why=why)
        commit.finish(connection, self._ctx.run_ctx, now)
        return last_event(connection)

    async def note_evals(self) -> None:
        """Write down evaluations that are through, before the last of them ends the run."""
        database = self._ctx.database
        latest = (await database.read(self._ctx.run_ctx.latest, "sweep")).step
        if due := set(self._ctx.config.eval_steps(latest)) - self._noted:
            found = await database.read(lambda c: evals.finished(c, self._ctx.config, due), "sweep")
            if found:
                await database.aside(partial(self._ctx.metrics.note_evals, found, self._ctx.clock()), "sweep")
            self._noted |= {view.step for view in found}

    async def tidy(self) -> None:
        """For ever, now and then: delete bodies of refused submissions and what came to nothing."""
        while True:
            await asyncio.sleep(TIDY_S * random.uniform(0.5, 1.5))
            try:
                await self.tidy_once(time.time())
                await self.forget()
            except Exception:
                log.exception("tidying failed, going on")

    async def forget(self) -> int:
        """Forget leases and nodes that came to nothing, a few in each transaction; gives how many."""
        count = 0
        while found := await self._ctx.database.write(self._forget_some):
            count += found
        await asyncio.to_thread(self._ctx.metrics.thin)
        return count

    def _forget_some(self, connection: Connection) -> int:
        return node_gc.forget(connection, self._ctx.run_ctx, self._ctx.clock())

    async def tidy_once(self, now: float) -> int:
        """Once; `now` by the clock of the blob store."""
        keep_s = UNREFERENCED_S + self._ctx.config.deadline_s
        count = await blob_gc.delete_unreferenced(self._ctx.archive.blobs, self._ctx.database, now - keep_s)
        if count:
            log.info("collected bodies=%d of refused submissions", count)
        return count
