"""The coordinator's routes in one table, and the application that answers them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import MethodType
from typing import TypeVar

from starlette.applications import Starlette
from starlette.types import ASGIApp

from farflung.coordinator import node_routes, role_routes, step_routes
from farflung.coordinator.context import Context
from farflung.coordinator.sweep import Sweeper
from farflung.dashboard import pages
from farflung.net.openapi import openapi
from farflung.net.server import Call, Route, add_route, mount
from farflung.net.session import Index
from farflung.protocol import messages as m
from farflung.protocol.identity import Signed

T = TypeVar("T")
BLOB_BYTES = 1 << 30
"""Of a shard: 32 MiB, or one whole matrix where adapters travel alone."""
MANY_BYTES = 256 << 20
"""Of scores, evidence, and a manifest that names every tensor."""


class Coordinator:
    """One coordinator with one run."""

    def __init__(self, ctx: Context) -> None:
        self.ctx, self.sweeper = ctx, Sweeper(ctx)
        self._for_ever: list[asyncio.Task[None]] = []
        self.pages: pages.Pages | None = None
        """The dashboard, once there is an app."""

    def app(self) -> ASGIApp:
        """The HTTP application."""

        @asynccontextmanager
        async def life(_: Starlette) -> AsyncIterator[None]:
            self._for_ever = [asyncio.create_task(self.sweeper.sweep()), asyncio.create_task(self.sweeper.tidy())]
            yield
            self.leave()
            self.ctx.metrics.flush(self.ctx.clock(), force=True)

        ctx = self.ctx
        app, table = Starlette(lifespan=life), routes(ctx)
        add_route(app, "GET", "/openapi.json", openapi(table, "farflung coordinator", str(m.VERSION)))
        served = mount(app, table, ctx.run_ctx.key.id, ctx.clock, ctx.access.count, ctx.access.bodies)
        self.pages = pages.mount(app, pages.Desk(ctx.config, ctx.database, ctx.archive, ctx.metrics.path, ctx.clock))
        return ctx.access.before(served)

    def leave(self) -> None:
        """Keep no caller waiting, and take no more leases: a coordinator out of reach must call no node silent."""
        self.ctx.long_poll.close()
        for task in self._for_ever:
            task.cancel()
        if self.pages is not None:
            self.pages.live.stop()


def routes(ctx: Context) -> list[Route]:
    """The protocol, one line each."""

    def to(handler: Callable[[Context, Call], Awaitable[T]]) -> Callable[[Call], Awaitable[T]]:
        return MethodType(handler, ctx)

    run, admin, leased = "/v1/runs/{run}", "/v1/admin/runs/{run}", to(node_routes.submission_gate)
    scorer, validator = ctx.gate("scorer", MANY_BYTES), ctx.gate("validator", MANY_BYTES)
    trainer, publisher = ctx.gate("trainer", MANY_BYTES), ctx.gate("trainer", BLOB_BYTES)
    return [
        Route("GET", "/metrics", to(node_routes.prometheus), signed=False),
        Route("GET", "/v1", to(node_routes.index), None, Index, signed=False),
        Route("POST", "/v1/nodes", to(node_routes.register), m.Register, m.Welcome),
        Route("GET", run, to(node_routes.run), None, m.Run, signed=False),
        Route("GET", f"{run}/status", to(node_routes.status), None, m.Status, signed=False),
        Route("GET", "/v1/story/{id}", to(node_routes.story), None, m.Story, signed=False),
        Route("POST", f"{run}/heartbeat", to(node_routes.heartbeat), m.Heartbeat, m.HeartbeatReply),
        Route("GET", f"{run}/latest", to(node_routes.latest), None, m.Latest, signed=False),
        Route("GET", f"{run}/weights", to(node_routes.weights), None, m.Weights, signed=False),
        Route("GET", f"{run}/relays", to(node_routes.relays), None, m.Relays, signed=False),
        Route("GET", f"{run}/manifests/{{digest}}", to(node_routes.manifest), None, Signed, signed=False),
        Route("GET", "/v1/blobs/{digest}", to(node_routes.get_blob), signed=False),
        Route("PUT", f"{run}/blobs/{{digest}}", to(step_routes.put_blob), None, m.Done, gate=publisher, raw=True),
        Route(
            "GET", f"{run}/manifests/{{digest}}/self-test", to(node_routes.self_test), None, m.SelfTest, signed=False
        ),
        Route("POST", f"{run}/leases", to(node_routes.ask_for_lease), m.LeaseRequest, m.LeaseAnswer),
        Route(
            "POST", f"{run}/leases/{{lease}}/submission", to(node_routes.submission), m.Submission, Signed, gate=leased
        ),
        Route("POST", f"{run}/leases/{{lease}}/return", to(node_routes.give_back), m.Empty, m.Done),
        Route("POST", f"{run}/scores/claim", to(role_routes.claim_scores), m.Claim, m.ScoreJobs),
        Route("POST", f"{run}/scores", to(role_routes.scores), m.Scores, m.Done, gate=scorer),
        Route("POST", f"{run}/audits/claim", to(role_routes.claim_audits), m.Claim, m.AuditJobs),
        Route("POST", f"{run}/audits/{{audit}}/evidence", to(role_routes.evidence), Signed, m.Done, gate=validator),
        Route("POST", f"{run}/steps/{{step}}/claim", to(step_routes.claim_step), m.ClaimStep, m.BatchAnswer),
        Route("POST", f"{run}/steps/{{step}}/trip", to(step_routes.trip), m.Trips, m.Done, gate=trainer),
        Route("POST", f"{run}/steps/{{step}}/commit", to(step_routes.commit_step), m.Commit, m.Done, gate=trainer),
        Route("GET", f"{run}/submissions/{{digest}}", to(step_routes.submission_body)),
        Route("GET", f"{run}/submissions/{{digest}}/logp", to(step_routes.logp_body)),
        Route("POST", f"{admin}/breaker/close", to(role_routes.close_breaker), m.Empty, m.Done),
        Route("POST", f"{admin}/rollback", to(role_routes.roll_back), m.Rollback, m.Done),
    ]
