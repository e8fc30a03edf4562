"""The API against its own OpenAPI: whatever schemathesis makes of it, signed or not, nothing answers 5xx."""

import asyncio
import contextlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from farflung.net.server import listen
from farflung.protocol.identity import sign_request

EXAMPLES = 4
ROOT = Path(__file__).parents[2]
KNOWN = {"run": "test", "step": "1"}
ROLES = {"worker": "eve", "trainer": "trainer", "scorer": "scorer", "validator": "val-1"}


async def schema_of(app) -> dict:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        return (await client.get("/openapi.json")).json()


def test_no_input_that_the_schema_allows_or_forbids_is_a_server_error(house) -> None:
    app = house.coordinator.app()
    schema = schemathesis.openapi.from_dict(with_known_paths(asyncio.run(schema_of(app))))
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 20

    async def prepare():
        for name in ROLES.values():
            await house.client(name)
        await house.step(0)

    asyncio.run(prepare())
    answers = Counter()
    for operation in operations:
        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
            answers.update(fuzz(house, app, operation, mode))
    assert {200, 400, 401, 403, 404} <= set(answers), answers
    assert answers.total() > 400


def with_known_paths(document):
    """The OpenAPI with runs and steps that exist, or nearly every case would end at an unknown run."""
    for path in document["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] in KNOWN:
                    parameter["schema"] = {"type": "string", "enum": [KNOWN[parameter["name"]]]}
    return document


def fuzz(house, app, operation, mode) -> Counter:
    """A handful of cases of one operation, each sent by nobody and by every role; gives how often which status came."""
    answers = Counter()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case) -> None:
        for name in (None, *ROLES.values()):
            response = asyncio.run(call(house, app, case, name))
            assert response.status_code < 500, (operation.label, name, case.body, response.text)
            if response.status_code >= 400 and operation.path.startswith("/v1"):
                assert response.headers["content-type"] == "application/problem+json", (operation.label, response.text)
                assert json.loads(response.content)["detail"]
            answers[response.status_code] += 1

    with contextlib.suppress(Unsatisfiable):  # an operation without parameters or body cannot be wrong
        check()
    return answers


async def call(house, app, case, name):
    """Send one case, waiting nowhere, to the application in this process."""
    asked = case.as_transport_kwargs(base_url="http://test")
    if isinstance(asked.get("json"), dict) and "wait_s" in asked["json"]:
        asked["json"]["wait_s"] = 0
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app, raise_app_exceptions=False)) as client:
        request = client.build_request(
            asked["method"],
            asked["url"],
            params=asked.get("params"),
            headers={key: value for key, value in (asked.get("headers") or {}).items() if value},
            **{key: asked[key] for key in ("json",) if key in asked},
            **({"content": asked["data"]} if asked.get("data") is not None else {}),
        )
        if name is not None:
            url = request.url
            path = url.raw_path.partition(b"?")[0].decode("latin-1")
            body = request.read()
            request.headers.update(
                sign_request(
                    house.named(name),
                    request.method,
                    path,
                    url.query.decode("latin-1"),
                    body,
                    now=house.clock(),
                    tag=house.ctx.run_ctx.key.id,
                )
            )
        return await client.send(request)


@pytest.mark.parametrize("host", ["127.0.0.1"])
def test_a_slow_loris_is_cut_off(house, host, monkeypatch) -> None:
    """A body that trickles in is given up after BODY_S, with a reason, while others are served."""
    import uvicorn

    from farflung.net import server

    monkeypatch.setattr(server, "BODY_S", 0.5)

    async def scene():
        listener = listen(host, 0)
        running = uvicorn.Server(uvicorn.Config(house.coordinator.app(), log_level="warning"))
        task = asyncio.create_task(running.serve(sockets=[listener]))
        while not running.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(host, listener.getsockname()[1])
        path = f"{house.path}/leases"
        headers = sign_request(
            house.named("eve"), "POST", path, "", b"x" * 99, now=house.clock(), tag=house.ctx.run_ctx.key.id
        )
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n{lines}\r\nx".encode())
        await writer.drain()
        answer = await asyncio.wait_for(reader.read(2000), 5)
        writer.close()
        running.should_exit = True
        await task
        listener.close()
        return answer

    answer = asyncio.run(scene())
    assert b" 400 " in answer.split(b"\r\n")[0]
    assert b"1 bytes of the body arrived" in answer


@pytest.mark.swarm
def test_odd_bytes_break_neither_decoders_nor_a_real_coordinator() -> None:
    """The small version of bench/fuzz.py, on another seed."""
    command = [sys.executable, str(ROOT / "bench" / "fuzz.py"), "--inputs", "4000", "--requests", "400", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, (figures, done.stderr[-2000:])
    assert figures["inputs"] >= 3900
    assert figures["statuses"]["200"] > 100
    assert figures["statuses"]["400"] > 50
