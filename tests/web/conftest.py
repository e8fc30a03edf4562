"""A coordinator that a test feeds, its pages on a real socket, and Chromium to look at them."""

import asyncio
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
import uvicorn

from farflung.dashboard import pages
from farflung.net.server import listen
from farflung.store.tables import NODES, ROLLOUTS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
NO_BROWSER = "no Chromium on this machine"
T = TypeVar("T")
WAIT_S = 20.0
WAIT_MS = 1000 * WAIT_S


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say at the end of a run how to have the tests that had no browser."""
    reports = terminalreporter.stats.get("skipped", ())
    if count := sum(NO_BROWSER in str(report.longrepr) for report in reports):
        terminalreporter.write_line(
            f"{count} tests of the pages were skipped: they look with Chromium. To have it: apt-get install chromium "
            "(or google-chrome in the PATH), and pip install playwright -c constraints.txt",
            yellow=True,
        )


def apart(work: Callable[[], T]) -> T:
    """Do something in a thread of its own: in the test's, the browser's driver has an event loop running."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


class Site:
    """A served coordinator. `play` is what happens there while somebody looks."""

    def __init__(self, house: Any) -> None:
        self.house = house
        self._listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        options = uvicorn.Config(
            house.coordinator.app(), log_level="error", lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = pages.Server(options, house.coordinator.leave)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve(sockets=[self._listener])))
        self._thread.start()
        until = time.monotonic() + WAIT_S
        while not self._server.started and time.monotonic() < until:
            time.sleep(0.02)

    def play(self, scenario: Callable[[Any], Awaitable[None]]) -> None:
        """Run a scenario."""
        apart(lambda: self.house.run(scenario))

    def close(self) -> None:
        """Stop serving."""
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()


async def begin(house: Any) -> None:
    """The first weights, a step with work of an honest node that is trusted, and a cheat that was caught."""
    await house.step(0)
    await house.make_trusted("ada")
    await house.client("mallory")
    mallory = house.named("mallory").id
    while house.row(NODES, mallory).status != "ejected":
        await house.work("mallory")
        mine = {row.rollout for row in house.rows(sa.select(ROLLOUTS).where(ROLLOUTS.c.node == mallory))}
        await house.audit(mine.__contains__)
    while (batch := await house.claim_step(1)) is None:
        await house.work("ada")
        await house.audit()
        await house.score()
    await house.commit(batch)


@pytest.fixture
def site(make_house: Callable[..., Any]) -> Iterable[Site]:
    """A run in its first steps."""
    site = Site(apart(lambda: make_house(run={"steps": 9}, eval={"every": 1, "tasks": 4, "samples": 4, "k": 2})))
    try:
        site.play(begin)
        yield site
    finally:  # a server that is left running keeps the whole test run from ending
        site.close()


@pytest.fixture(scope="module")
def chromium() -> Iterable[Any]:
    """One browser for the tests of a file."""
    playwright = pytest.importorskip("playwright.sync_api", reason=NO_BROWSER)
    if CHROMIUM is None:
        pytest.skip(NO_BROWSER)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def look(chromium: Any, site: Site) -> Iterable[Callable[..., Any]]:
    """Opens pages of the site; at the end no page may have complained or asked another host for anything."""
    complaints: list[str] = []
    contexts: list[Any] = []

    def watch(page: Any) -> None:
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda ask: None if ask.url.startswith(site.url) else complaints.append(ask.url))

    def open(path: str = "/", **options: Any) -> Any:
        context = chromium.new_context(**options)
        context.set_default_timeout(WAIT_MS)
        contexts.append(context)
        page = context.new_page()
        watch(page)
        page.goto(site.url + path, wait_until="load")
        return page

    def forgive(words: str) -> None:
        complaints[:] = [text for text in complaints if words not in text]

    open.forgive = forgive  # type: ignore[attr-defined]
    yield open
    for context in contexts:
        context.close()
    assert complaints == []
