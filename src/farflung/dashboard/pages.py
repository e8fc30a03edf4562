"""The pages: GET, unsigned, readable without JavaScript. Every value on them is escaped and no script is inline."""

import hashlib
import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import uvicorn
from sqlalchemy import Connection
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from farflung.config import Config
from farflung.dashboard.formats import HERE, TEXT_SHOWN, clean, curves, environment
from farflung.dashboard.live import Live
from farflung.net.rate_limit import sender_of
from farflung.net.server import add_route
from farflung.protocol.errors import Broken, Malformed, NotFound, Refusal
from farflung.protocol.states import statuses
from farflung.queries import browse, params
from farflung.queries import story as stories
from farflung.queries.cost import Meter
from farflung.queries.node_views import DESCENDING, SORTS, by_profile, ordered
from farflung.queries.redact import redaction_of
from farflung.queries.shared import Shared
from farflung.queries.snapshot import Snapshot, take
from farflung.queries.versions import node_errors, why_large
from farflung.rollouts.archive import Archive
from farflung.store.db import Database

log = logging.getLogger(__name__)
NODES_A_PAGE = 100
NAMES_S = 20.0
"""Pages that need of the snapshot little more than names take one this old."""
SECURITY = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
"""The headers that every page is sent with: hostile text that slipped through an escape still could not run."""


@dataclass(frozen=True)
class Desk:
    """The sources that the pages are made from. `archive` is None where the model's tokenizer cannot be had."""

    config: Config
    database: Database
    archive: Archive | None
    metrics: Path
    clock: Callable[[], float]
    is_live: bool = True

    @cached_property
    def meter(self) -> Meter:
        """Cost and overhead so far."""
        return Meter(self.metrics, self.config)

    async def snapshot(self) -> Snapshot:
        """Read everything the home page shows."""
        return await self.database.read_page(lambda c: take(c, self.config, self.meter, self.clock()))


class Pages:
    """One method per page."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._templates = environment(is_live=desk.is_live, run=desk.config.run.name, asset=asset)
        self.live = Live(desk.snapshot, self._render)
        self.accounts = Shared(lambda: desk.database.read_page(browse.accounts))

    # --- pages -------------------------------------------------------------------------------------------------------

    async def home(self, request: Request) -> Response:
        """The run at a glance."""
        s = await self.live.snapshot()
        points = curves(s.steps, s.evals)
        held_out = self.desk.config.eval
        k = held_out.k if held_out.samples else 0
        return await self._page("home.html", s=s, points=points, k=k, page="home", table=_table(s, request))

    async def nodes(self, request: Request) -> Response:
        """The nodes table alone, for htmx."""
        return await self._page("nodes.html", table=_table(await self.live.snapshot(), request))

    async def rollouts(self, request: Request) -> Response:
        """Rollouts with their answers, newest first."""
        wanted = _wanted(request)
        s = await self.live.snapshot(NAMES_S)
        counts, run = s.counts.statuses, self.desk.config.run.name
        known = counts.get(wanted.status, 0)
        redacted: Callable[[Connection], Any] = lambda c: browse.rollouts(  # noqa: E731
            c, run, wanted, known, redaction_of(c, self.desk.config)
        )
        found = await self.desk.database.read_page(redacted)
        texts = await self._texts(found.rows)
        verdicts = {v.node: v for v in reversed(s.verdicts)}
        return await self._page(
            "rollouts.html", page="rollouts", wanted=wanted, found=found, texts=texts, counts=counts,
            statuses=statuses("rollout"), verdicts=verdicts, names=s.names, parts=browse.parts,
        )  # fmt: skip

    async def story(self, request: Request) -> Response:
        """The story of one id."""
        subject = params.an_id(request.path_params["id"], "id")
        found = await self.desk.database.read_page(lambda c: stories.tell(c, self.desk.config, subject))
        texts = await self._texts(found.rollouts[:64])
        s = await self.live.snapshot(NAMES_S)
        return await self._page("story.html", page="story", told=found, texts=texts, names=s.names, parts=browse.parts,
                          verdicts={v.node: v for v in reversed(s.verdicts)})  # fmt: skip

    async def find(self, request: Request) -> Response:
        """The search box: to the story of an id, or to a node by its name."""
        wanted = request.query_params.get("id", "").strip()
        by_name = {node.name: node.node for node in (await self.live.snapshot(NAMES_S)).nodes}
        if not wanted:
            return RedirectResponse("/", 303)
        return RedirectResponse(f"/story/{by_name.get(wanted) or params.an_id(wanted, 'id or name of a node')}", 303)

    async def weights(self, request: Request) -> Response:
        """Published steps: digests, bytes, contributors, the nodes that have them."""
        s = await self.live.snapshot()
        until = params.number(request.query_params.get("until", ""), "step", s.step, most=params.STEP)
        loaded = Counter(node.loaded_step for node in s.nodes if node.is_present or s.status == "finished")
        run = self.desk.config.run.name
        versions = await self.desk.database.read_page(lambda c: browse.weights(c, run, until, loaded))
        since = self.desk.clock() - self.desk.config.lease.lost_s if s.status != "finished" else 0.0
        said = await self.desk.database.read_page(lambda c: node_errors(c, since))
        learn, newer = self.desk.config.learn, min(s.step, until + browse.STEPS_A_PAGE)
        note = "" if learn.lora_rank else why_large(learn.lr, versions)
        return await self._page("weights.html", page="weights", s=s, versions=versions, note=note,
                          present=loaded.total(), node_errors=said, until=until, newer=newer,
                          most=browse.STEPS_A_PAGE)  # fmt: skip

    async def ledger(self, request: Request) -> Response:
        """Each account's credit, and why it has it."""
        before = params.number(request.query_params.get("before", ""), "entry", 0, most=params.ENTRY)
        accounts = await self.accounts.get()
        entries = await self.desk.database.read_page(lambda c: browse.entries(c, before))
        names = {node: name for node, name, _, _ in accounts.nodes}
        return await self._page("ledger.html", page="ledger", accounts=accounts, entries=entries, before=before,
                          names=names, most=browse.ENTRIES_A_PAGE)  # fmt: skip

    async def events(self, request: Request) -> Response:
        """Server-sent events."""
        sender = sender_of(request.client.host) if request.client else ""
        self.live.viewers.check(sender)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(self.live.events(sender), media_type="text/event-stream", headers=headers)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _render(self, template: str, s: Snapshot) -> str:
        return self._templates.get_template(template).render(s=s)

    async def _page(self, template: str, **values: Any) -> Response:
        """A page, written where it keeps no node waiting."""
        return await self.desk.database.aside(partial(self._written, template, **values), "pages")

    def _written(self, template: str, status: int = 200, **values: Any) -> Response:
        text = self._templates.get_template(template).render(**values)
        return HTMLResponse(text, status, headers={"cache-control": "no-store"})

    def instead(self, error: Refusal) -> Response:
        """The page for what is not there, or cannot be: what was wrong with the question, and the way back."""
        return self._written("missing.html", error.status, page="", reason=str(error))

    async def _texts(self, rows: list[Any]) -> dict[str, str]:
        """Transcripts of rollouts, where they are stored and can be read."""
        archive, found = self.desk.archive, dict[str, str]()
        if archive is None:
            return found
        for row in rows:
            if row.submission and row.position is not None:
                try:
                    ids: bytes = (await archive.body(row.submission)).rollouts[row.position].ids
                except NotFound:
                    continue
                text = await self.desk.database.aside(partial(archive.text, ids[: 4 * TEXT_SHOWN]), "pages")
                found[row.rollout] = clean(text)
        return found


def mount(app: Starlette, desk: Desk) -> Pages:
    """Put the pages on the coordinator's app, or on one of their own; their streams end when told to."""
    pages = Pages(desk)
    for path, page in (
        ("/", pages.home),
        ("/nodes", pages.nodes),
        ("/rollouts", pages.rollouts),
        ("/weights", pages.weights),
        ("/ledger", pages.ledger),
        ("/story", pages.find),
        ("/story/{id:path}", pages.story),
        ("/live", pages.events),
    ):
        add_route(app, "GET", path, _guarded(pages, page))
    app.mount("/static", Static(directory=HERE / "static"), name="static")
    return pages


def _guarded(pages: Pages, page: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            response = await page(request)
        except (NotFound, Malformed) as error:
            response = pages.instead(error)
        except Refusal:
            raise
        except Exception:  # whatever broke stays in the log: a stranger learns nothing of it
            log.exception("broken page path=%s", request.scope["path"][:200])
            response = pages.instead(Broken("this page cannot be shown; the coordinator's log says why"))
        response.headers.update(SECURITY)
        return response

    return endpoint


class Server(uvicorn.Server):
    """uvicorn, which on its way out ends what `leave` ends, streams say, before it waits for requests to end."""

    def __init__(self, config: uvicorn.Config, leave: Callable[[], None]) -> None:
        super().__init__(config)
        self._leave = leave

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop serving."""
        self._leave()
        await super().shutdown(sockets)


class Static(StaticFiles):
    """Our own files; addressed by content (`asset`), so a browser may keep them."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """A file with its headers."""
        response = await super().get_response(path, scope)
        response.headers.update(SECURITY)
        response.headers["cache-control"] = (
            "public, max-age=31536000, immutable" if scope["query_string"] else "no-cache"
        )
        return response


def asset(name: str) -> str:
    """The address of a file under static/, with its digest."""
    return f"/static/{name}?v={hashlib.sha256((HERE / 'static' / name).read_bytes()).hexdigest()[:12]}"


# --- the nodes table -------------------------------------------------------------------------------------------------


def _table(s: Snapshot, request: Request) -> dict[str, Any]:
    """The part of the nodes' table that is asked for: column, direction, page."""
    wish = request.query_params
    sort = wish.get("sort", "role")
    sort = sort if sort in SORTS else "role"
    is_down = wish.get("order", "down" if sort in DESCENDING else "up") == "down"
    pages = max(1, -(-len(s.nodes) // NODES_A_PAGE))
    page = min(pages, max(1, _page_number(wish.get("page", ""))))
    rows = ordered(s.nodes, sort, is_down)[(page - 1) * NODES_A_PAGE : page * NODES_A_PAGE]
    return {"rows": rows, "sort": sort, "is_down": is_down, "page": page, "pages": pages, "total": len(s.nodes),
            "first_down": DESCENDING, "profiles": by_profile(s.nodes), "suspect": s.breaker_profiles}  # fmt: skip


def _page_number(text: str) -> int:
    """Of a table that refreshes itself: whatever is no number is the first page."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 1


def _wanted(request: Request) -> browse.Wanted:
    """Which rollouts are asked for. Raises Malformed."""
    status, node, older, newer = (request.query_params.get(name, "") for name in ("status", "node", "older", "newer"))
    if status and status not in statuses("rollout"):
        raise Malformed(f"{status[:40]!r} is no status of a rollout; there are {', '.join(statuses('rollout'))}")
    return browse.Wanted(status, node and params.an_id(node, "node"), older, newer)
