"""The operator's routes: apart from those of nodes, for the token alone; and how much others may ask."""

import inspect
import logging
import re

import httpx2
import pytest

from farflung.coordinator.routes import routes
from farflung.net.admin import bears, read_token
from farflung.protocol import messages as m
from farflung.protocol.errors import Busy, ConfigError, Forbidden

TOKEN = "correct-horse-battery-staple"


@pytest.fixture
def guarded(make_house, tmp_path):
    """A run with an admin token."""
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    return make_house(coordinator={"admin_token_file": str(file)})


def test_the_operators_routes_are_for_whoever_carries_the_token(guarded, caplog) -> None:
    async def scenario(house) -> None:
        caplog.set_level(logging.DEBUG)
        release = f"{house.admin_path}/breaker/close"
        for name, token in (("ada", ""), ("coordinator", ""), ("trainer", TOKEN[:-1]), ("ada", f"{TOKEN} ")):
            line = house.line(name)
            line.admin_token = token
            with pytest.raises(Forbidden, match="admin token"):
                await line.post(release, m.Empty(), m.Done)
            await line.close()
        operator = house.line("somebody who was told the token")
        operator.admin_token = TOKEN
        assert (await operator.post(release, m.Empty(), m.Done)).changed == 0
        with pytest.raises(Forbidden, match="role 'scorer'"):
            await operator.post(f"{house.path}/scores/claim", m.Claim(), m.ScoreJobs)
        await operator.close()

    guarded.run(scenario)
    assert "admin refused" in caplog.text
    assert TOKEN[:-1] not in caplog.text
    assert TOKEN not in guarded.config.model_dump_json()


def test_a_request_with_the_token_must_be_signed_all_the_same(guarded) -> None:
    async def scenario(house) -> None:
        transport = httpx2.ASGITransport(app=house.coordinator.app())
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.post(
                f"{house.admin_path}/breaker/close", content=b"{}", headers={"authorization": f"Bearer {TOKEN}"}
            )
        assert answer.status_code == 401

    guarded.run(scenario)


def test_what_only_the_operator_may_is_under_admin_and_nothing_else_is(house) -> None:
    for route in routes(house.ctx):
        is_operators = "require_operator" in inspect.getsource(route.handler)
        assert is_operators == route.path.startswith("/v1/admin/"), route.path
        assert route.method == "GET" or route.signed, route.path


def test_a_token_that_is_none_is_refused(tmp_path) -> None:
    file = tmp_path / "token"
    assert read_token("", {}) == ""
    assert read_token(str(file), {"FARFLUNG_ADMIN_TOKEN": TOKEN}) == TOKEN, "the environment goes before the file"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_token(str(file), {})
    for text, mode, why in (("", 0o600, "is empty"), (TOKEN, 0o644, "chmod 600"), ("short", 0o600, "at least 16")):
        file.write_text(text)
        file.chmod(mode)
        with pytest.raises(ConfigError, match=why) as told:
            read_token(str(file), {})
        assert not text or text not in str(told.value)


@pytest.mark.parametrize("header", ["", TOKEN[:-1], f"bearer {TOKEN}", f"Bearer  {TOKEN}", f"Bearer {TOKEN}x", "é"])
def test_only_the_whole_token_will_do(header: str) -> None:
    assert not bears(header, TOKEN)
    assert bears(f"Bearer {TOKEN}", TOKEN)


def test_a_key_that_asks_too_often_is_told_when_to_come_back(make_house) -> None:
    async def scenario(house) -> None:
        ada, bob, trainer = [await house.client(name) for name in ("ada", "bob", "trainer")]
        for _ in range(3):
            await ada.post(f"{house.path}/heartbeat", m.Heartbeat(), m.HeartbeatReply)
        with pytest.raises(Busy, match=r"node n\w+ asks more than 0.1 times a second") as told:
            await ada.post(f"{house.path}/heartbeat", m.Heartbeat(), m.HeartbeatReply)
        assert 1 <= told.value.retry_after_s <= 10
        await bob.post(f"{house.path}/heartbeat", m.Heartbeat(), m.HeartbeatReply)
        for _ in range(9):  # the operator's own roles have a whole run's work
            await trainer.post(f"{house.path}/heartbeat", m.Heartbeat(), m.HeartbeatReply)

    make_house(coordinator={"rate_per_key": 0.1, "rate_burst_s": 40.0}).run(scenario)


def test_an_address_that_asks_too_often_is_turned_away_from_pages_too(make_house) -> None:
    async def scenario(house) -> None:
        app = house.coordinator.app()

        async def ask(address: str) -> httpx2.Response:
            transport = httpx2.ASGITransport(app=app, client=(address, 9))
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.get("/nodes")

        answers = [await ask("203.0.113.9") for _ in range(4)]
        assert [one.status_code for one in answers] == [200, 200, 200, 429]
        assert answers[-1].headers["content-type"] == "application/problem+json"
        assert re.fullmatch(r"\d+", answers[-1].headers["retry-after"])
        assert (await ask("203.0.113.10")).status_code == 200

    make_house(coordinator={"rate_per_address": 0.1, "rate_burst_s": 30.0}).run(scenario)
