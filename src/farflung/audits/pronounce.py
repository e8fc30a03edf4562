"""Coordinator: seal a verdict, write it down, say so."""

import logging

import msgspec
from sqlalchemy import Connection

from farflung.protocol.identity import seal
from farflung.protocol.messages import Verdict
from farflung.store.run import RunContext
from farflung.store.tables import VERDICTS

log = logging.getLogger(__name__)


def pronounce(
    connection: Connection,
    run_ctx: RunContext,
    verdict: Verdict,
    submissions: int,
    *,
    step: int = -1,
    profile: str = "",
    was_trusted: bool = False,
) -> None:
    """Keep a verdict on a node that had so many submissions, with the step and profile of its evidence, if any."""
    document = msgspec.msgpack.encode(seal(run_ctx.verdicts, "verdict", verdict))
    values = {"run": run_ctx.run, "node": verdict.node, "outcome": verdict.outcome, "step": step, "document": document}
    values |= {"profile": profile, "submissions": submissions, "was_trusted": was_trusted}
    connection.execute(VERDICTS.insert().values(values))
    log.info("verdict node=%s outcome=%s reason=%s", verdict.node, verdict.outcome, verdict.reason)
