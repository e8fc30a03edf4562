"""The pages over HTTP: headers, errors, events, paging; the finished run; the report."""

import asyncio
import json
import re
import shutil
from pathlib import Path

import httpx2
import msgspec
import pytest
import sqlalchemy as sa
from starlette.routing import Route

from farflung.config import load, save
from farflung.launch.report import write_report
from farflung.launch.summary import summarise, write_summary
from farflung.launch.view import app_of, desk_of, run_in
from farflung.net.session import PURPOSES
from farflung.ops.backup import back_up, restore
from farflung.ops.keys import show
from farflung.protocol import messages as m
from farflung.protocol.errors import ConfigError
from farflung.queries import browse
from farflung.queries.redact import Redaction
from farflung.store.tables import GROUPS, LEASES, NODES, ROLLOUTS
from farflung.tasks import keyring
from farflung.trust.record import NodeRecord, Watched

PAGES = ("/", "/nodes", "/rollouts", "/weights", "/ledger", "/story/test", "/story/test-step-1", "/story/nothing")


async def some_steps(house) -> None:
    """Two steps' work of two nodes."""
    await house.step(0)
    for step in (1, 2):
        await house.work("ada")
        await house.work("bob")
        await house.audit()
        await house.score()
        await house.step(step)


def get(app, *paths: str) -> list[httpx2.Response]:
    """Answers of an app in this process."""

    async def ask() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
            return [await client.get(path) for path in paths]

    return asyncio.run(ask())


def test_every_page_is_sent_with_its_guards(house) -> None:
    house.run(some_steps)
    for path, answer in zip(PAGES, get(house.coordinator.app(), *PAGES), strict=True):
        assert answer.status_code == (404 if path == "/story/nothing" else 200), path
        assert answer.headers["content-type"].startswith("text/html"), path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert not re.search(r"""(src|href)=["']?(https?:)?//""", answer.text), f"{path} asks another host"
        assert not re.search(r"<script(?![^>]* src=)|\son\w+=|\sstyle=|javascript:", answer.text), path


def replayed(house) -> None:
    """Both nodes have replays behind them."""
    house.run(some_steps)
    record = NodeRecord(watched=Watched(groups=1, rollouts=8, flips=2, allowed=4.0))
    with house.ctx.database.engine.begin() as connection:
        connection.execute(sa.update(NODES).values(record=msgspec.msgpack.encode(record)))


def test_replays_are_shown_by_numerics_profile_unless_they_are_not_to_be_told(house, make_house) -> None:
    replayed(house)
    (answer,) = get(house.coordinator.app(), "/nodes")
    found = re.search(r"By numerics profile.*?<tbody>(.*?)</tbody>", answer.text, re.DOTALL)
    assert found is not None
    cells = re.findall(r"<td[^>]*>(?:<bdi>)?(.*?)(?:</bdi>)?</td>", found[1])
    assert cells == ["the run&#39;s own", "2", "0", "16", "4", "8.0", "0.50"]
    hidden = make_house(coordinator={"redact": True})
    replayed(hidden)
    assert "By numerics profile" not in get(hidden.coordinator.app(), "/nodes")[0].text


def test_tasks_are_shown_in_pools_and_what_is_drawn_for_a_step_once_that_is_over(make_house) -> None:
    for redact, drawn, told in ((False, 4, [True, True, True]), (True, 0, [False, False, False])):
        house = make_house(coordinator={"redact": redact})
        house.run(some_steps)
        home, *steps = get(house.coordinator.app(), "/", *(f"/story/test-step-{step}" for step in range(3)))
        shown = dict(re.findall(r'<tr><td>(\w+)</td><td class="num">(\d+)</td>', home.text))
        assert (shown["sometimes"], shown["unseen"], shown["always"]) == ("4", "60", "0")
        lately = re.findall(r'<tr><td>\w+</td><td class="num">\d+</td><td class="num">(\d+)</td>', home.text)
        assert sum(map(int, lately)) == drawn
        assert ["Drawn for its policy" in step.text for step in steps] == told


def test_what_was_drawn_is_told_when_no_step_can_train_on_it(make_house) -> None:
    house = make_house(coordinator={"redact": True}, learn={"max_staleness": 0})
    house.run(some_steps)
    told = get(house.coordinator.app(), *(f"/story/test-step-{step}" for step in range(3)))
    assert ["Drawn for its policy" in step.text for step in told] == [True, True, False]


def test_the_weights_page_says_what_went_wrong_in_the_nodes_own_words(house) -> None:
    said = "relay http://<b>liar</b>:7000: shard 1234 hashes to 5678"

    async def scenario(house) -> None:
        await house.step(0)
        ada = await house.client("ada")
        await ada.post("/v1/runs/test/heartbeat", m.Heartbeat(last_error=said), m.HeartbeatReply)
        weights = await ada.get("/v1/runs/test/weights", m.Weights)
        assert [(one.name, one.said) for one in weights.node_errors] == [("ada", said)]

    house.run(scenario)
    (page,) = get(house.coordinator.app(), "/weights")
    assert "relay http://&lt;b&gt;liar&lt;/b&gt;:7000: shard 1234 hashes to 5678" in page.text


def test_static_files_are_guarded_and_kept(house) -> None:
    app = house.coordinator.app()
    (home,) = get(app, "/")
    files = re.findall(r'(?:src|href)="(/static/[^"]+)"', home.text)
    assert len(files) >= 7
    for answer in get(app, *files):
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    for answer in get(app, "/static/../pages.py", "/static/%2e%2e/pages.py", "/static/nothing.js"):
        assert answer.status_code == 404


@pytest.mark.parametrize(
    "query",
    ["sort=%00", "sort=credit&order=sideways&page=-1", "page=99999999999999999999", "page=１"],
)
def test_odd_questions_get_the_table_anyway(house, query) -> None:
    (answer,) = get(house.coordinator.app(), f"/nodes?{query}")
    assert answer.status_code == 200


ODD = {
    "/story?id=a/b": 404,
    "/story?id=%00": 404,
    "/story?id=" + "a" * 5000: 404,
    "/story?id=../../v1": 404,
    "/story?id=//evil.example": 404,
    "/story/%00": 404,
    "/story/a%2Fb": 404,
    "/story/a/b": 404,
    "/story/" + "a" * 5000: 404,
    "/story/%F0%9F%92%A9": 404,
    "/rollouts?older=nan~x": 400,
    "/rollouts?older=inf~x": 400,
    "/rollouts?older=x": 400,
    "/rollouts?newer=1e999~": 400,
    "/rollouts?newer=1~%00": 400,
    "/rollouts?status='": 400,
    "/rollouts?node=%00": 404,
    "/ledger?before=99999999999999999": 400,
    "/ledger?before=99999999999999999999": 400,
    "/ledger?before=-1": 400,
    "/ledger?before=%D9%A1": 400,
    "/weights?until=999999999999999": 400,
    "/weights?until=1e3": 400,
}


@pytest.mark.parametrize("path", ODD)
def test_an_odd_question_gets_a_page_that_says_what_was_wrong(house, path) -> None:
    house.run(some_steps)
    (answer,) = get(house.coordinator.app(), path)
    assert answer.status_code == ODD[path]
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "Nothing here" in answer.text
    assert " is no " in answer.text


def test_the_search_box_finds_nodes_by_names_that_are_no_ids(house) -> None:
    async def scenario(house) -> None:
        await house.line("ada").post("/v1/nodes", m.Register(version=m.VERSION, name="my box/2 (a+b)"), m.Welcome)

    house.run(scenario)
    found, spaced = get(house.coordinator.app(), "/story?id=my box/2 (a%2Bb)", "/story?id=+test+")
    assert (found.status_code, found.headers["location"]) == (303, f"/story/{house.named('ada').id}")
    assert (spaced.status_code, spaced.headers["location"]) == (303, "/story/test")


def test_a_page_that_breaks_tells_nothing_of_why(house, caplog, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(browse, "accounts", broken)
    (answer,) = get(house.coordinator.app(), "/ledger")
    assert answer.status_code == 500
    assert answer.headers["content-type"].startswith("text/html")
    assert "secret detail" not in answer.text
    assert "secret detail" in caplog.text


def test_paging_shows_every_rollout_once_there_and_back(house, monkeypatch) -> None:
    monkeypatch.setattr(browse, "ROLLOUTS_A_PAGE", 3)
    house.run(some_steps)

    def page(known: int, **wanted: str) -> browse.RolloutPage:
        with house.ctx.database.engine.connect() as connection:
            return browse.rollouts(connection, "test", browse.Wanted(**wanted), known, Redaction())

    for known in (1, 10**9):
        for only in ({}, {"status": "trained"}, {"node": house.named("ada").id}):
            pages = [page(known, **only)]
            while pages[-1].older:
                pages.append(page(known, older=pages[-1].older, **only))
            told = [row.rollout for found in pages for row in found.rows]
            where = sa.true() if "node" not in only else ROLLOUTS.c.node == only["node"]
            assert sorted(told) == sorted(row[0] for row in house.rows(sa.select(ROLLOUTS.c.rollout).where(where)))
            back = pages[-1]
            for before in reversed(pages[:-1]):
                back = page(known, newer=back.newer, **only)
                assert [row.rollout for row in back.rows] == [row.rollout for row in before.rows]
            assert back.newer == ""


def test_stories_lead_from_one_id_to_the_next(house) -> None:
    house.run(some_steps)
    rollout = house.rows(sa.select(ROLLOUTS))[0]
    group = house.row(GROUPS, rollout.group)
    lease = house.row(LEASES, rollout.lease)
    ids = [rollout.rollout, rollout.lease, rollout.group, rollout.submission, rollout.node, group.task, "test-step-1"]
    answers = get(house.coordinator.app(), *(f"/story/{id}" for id in ids))
    assert [answer.status_code for answer in answers] == [200] * len(ids)
    for id in (rollout.lease, rollout.group, rollout.submission, rollout.node, group.task):
        assert f"/story/{id}" in answers[0].text
    assert f"/story/{rollout.rollout}" in answers[1].text
    assert f"/story/{lease.submission}" in answers[4].text
    assert f"/story/{rollout.submission}" in answers[6].text


def test_secrets_of_the_operator_stay_off_the_pages(make_house) -> None:
    house = make_house(coordinator={"admission": "invite", "invites": ["sesame-open"]})
    for answer in get(house.coordinator.app(), "/", "/story/test"):
        assert "sesame-open" not in answer.text
        assert "sqlite" not in answer.text


def test_events_carry_what_changed(house) -> None:
    house.run(some_steps)
    house.coordinator.app()

    async def listen() -> list[bytes]:
        found: list[bytes] = []
        async for chunk in house.coordinator.pages.live.events("192.0.2.1"):
            found.append(chunk)
            if len(found) == 2:
                return found
        return found

    _, first = asyncio.run(listen())
    names = re.findall(rb"^event: (\w+)$", first, re.M)
    assert names == [b"head", b"strip", b"pools", b"verdicts", b"curves"]
    (curves,) = re.findall(rb"^event: curves\ndata: (.*)$", first, re.M)
    assert [x for x, _ in json.loads(curves)["reward"]] == [1, 2]
    assert all(line == b"" or line.startswith((b"event: ", b"data: ")) for line in first.split(b"\n"))


def test_a_run_that_is_over_is_shown_read_only(house) -> None:
    house.run(some_steps)
    house.ctx.metrics.flush(house.clock(), force=True)
    from farflung.config import save

    save(house.config, house.config.folder / "config.json")
    desk = desk_of(run_in(house.config.folder))
    app, _ = app_of(desk)
    answers = get(app, *PAGES)
    assert [answer.status_code for answer in answers] == [200] * 7 + [404]
    assert "read only" in answers[0].text
    assert "sse-connect" not in answers[0].text
    methods = {method for route in app.routes if isinstance(route, Route) for method in route.methods}
    assert methods == {"GET"}
    assert not [route.path for route in app.routes if isinstance(route, Route) and route.path.startswith("/v1")]
    desk.database.close()


def test_a_folder_without_a_run_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run: config\.json is missing"):
        run_in(tmp_path)


def test_a_folder_that_was_moved_and_renamed_is_the_run(house, tmp_path, capsys) -> None:
    """Its config.json says where it was founded, relative to where the command was given then."""
    house.run(some_steps)
    here = house.config.run.model_copy(update={"dir": Path("runs")})
    moved = tmp_path / "elsewhere" / "other"
    shutil.copytree(house.config.folder, moved)
    save(house.config.model_copy(update={"run": here}), moved / "config.json")
    (moved / "keys").mkdir(exist_ok=True)
    keyring.delegated(moved / "keys", house.config.run.name, dict.fromkeys(PURPOSES, bytes(32)), 0.0)
    assert asyncio.run(write_report(moved, write_summary(moved))) == moved / "report.html"
    assert summarise(moved)["steps"] > 0
    config = load(moved / "config.json", environ={})
    show(config)
    assert "coordinator" in capsys.readouterr().out
    told = asyncio.run(back_up(config, tmp_path / "copy"))
    assert told.startswith(f"backed up run {config.run.name!r}")
    told = asyncio.run(restore(tmp_path / "copy", tmp_path / "back"))
    again = load(tmp_path / "back" / config.run.name / "config.json", environ={})
    assert again.folder.resolve() == (tmp_path / "back" / config.run.name).resolve()
    assert summarise(again.folder)["steps"] == summarise(moved)["steps"]


def test_the_report_stands_alone(house) -> None:
    house.run(some_steps)
    from farflung.config import save

    folder = house.config.folder
    save(house.config, folder / "config.json")
    house.ctx.metrics.write("start", house.clock(), commit="abc1234")
    house.ctx.metrics.write("end", house.clock() + 9)
    path = asyncio.run(write_report(folder, write_summary(folder)))
    text = path.read_text()
    assert "abc1234" in text
    assert "ada" in text
    assert "<polyline" in text
    assert not re.search(r"<script|<link|(src|href)=|url\(", text), "it must not need anything else"
    assert "grants" not in text
