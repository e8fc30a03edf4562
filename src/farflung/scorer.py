"""Scorer: claims transcripts, has child processes judge them, reports rewards. It sees no secret and no weights."""

import contextlib
import logging
import sys

from farflung.config import Config
from farflung.envs.child import ScorerChild
from farflung.net.client import Client
from farflung.net.session import Session
from farflung.protocol.identity import Key
from farflung.rollouts import score

log = logging.getLogger(__name__)
WAIT_S = 5.0


class Scorer:
    """One scorer with a few children, each an environment in a process of its own."""

    def __init__(self, url: str, key: Key, config: Config, *, root: bytes | None = None, name: str = "scorer") -> None:
        self.client, self.config, self.name, self._root = Client(url, key), config, name, root
        self.is_stopping = False
        self.session: Session
        self.children: list[ScorerChild] = []

    async def run(self) -> None:
        """Work until the run ends or the scorer is told to stop."""
        self.session = await Session.open(
            self.client, "scorer", run=self.config.run.name, root=self._root, name=self.name
        )
        env = self.config.env
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(self.config.scorer.children):
                child = ScorerChild(env.name, env.args, python=env.python or sys.executable)
                self.children.append(await stack.enter_async_context(child))
            async with self.session.running("scorer", self.stop, metrics_port=self.config.scorer.metrics_port):
                while not self.is_stopping and not self.session.is_over:
                    await self.step()

    def stop(self) -> None:
        """Stop after the work in hand."""
        self.is_stopping = True
        self.session.shorten_patience()

    async def step(self) -> None:
        """Claim, judge, report."""
        self.session.stats.phase = "waiting"
        jobs = await score.claim(self.session, self.config.scorer.claim, WAIT_S)
        if jobs:
            self.session.stats.phase = "scoring"
            results = await score.score_all(self.children, jobs, self.config.scorer.timeout_s)
            await score.report(self.session, results)
            faults = sum(bool(result.error) for result in results)
            log.debug("scored rollouts=%d faults=%d", len(results), faults)
