"""What an enemy with the source in hand sends, and the answer: a problem with a stable code, and nothing lost."""

import asyncio
import logging
import math

import httpx2
import msgspec
import pytest
import sqlalchemy as sa

from farflung.coordinator import node_routes
from farflung.net.client import Client
from farflung.net.session import Session
from farflung.protocol import errors, wire
from farflung.protocol import messages as m
from farflung.protocol.identity import Signed, seal, sign_request
from farflung.rollouts.validate import inspect
from farflung.store import ledger
from farflung.store.tables import AUDITS, LEASES, NODES, ROLLOUTS, SUBMISSIONS
from farflung.trust.evidence import Profiles

BATCH_ROUTE = "/v1/runs/test/leases"


def send(house, method, path, *, body=b"", headers=None, key=None, tag=None, signed_path=None, query=""):
    """One raw request; signed if there is a key. Gives the response, and checks the shape of a refusal."""

    async def go():
        transport = httpx2.ASGITransport(app=house.coordinator.app(), raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            given = {} if key is None else _signature(house, key, method, signed_path or path, query, body, tag)
            url = path + (f"?{query}" if query else "")
            return await client.request(method, url, content=body, headers=given | (headers or {}))

    response = asyncio.run(go())
    if response.status_code >= 400:
        problem = response.json()
        assert response.headers["content-type"] == "application/problem+json"
        assert set(problem) == {"type", "title", "status", "code", "detail"}
        assert problem["status"] == response.status_code
    return response


def _signature(house, key, method, path, query, body, tag):
    tag = house.ctx.run_ctx.key.id if tag is None else tag
    return sign_request(key, method, path, query, body, now=house.clock(), tag=tag)


def code(response) -> str:
    return response.json()["code"]


def started(house, *names) -> dict[str, m.Lease]:
    """Weights of step 0, and a lease for each name."""
    leases = {}

    async def scenario(house) -> None:
        await house.step(0)
        for name in names:
            leases[name] = await house.lease(name)

    house.run(scenario)
    return leases


def submission_path(lease) -> str:
    return f"/v1/runs/test/leases/{lease.lease}/submission"


# --- strangers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/nodes"),
        ("POST", BATCH_ROUTE),
        ("POST", "/v1/runs/test/heartbeat"),
        ("PUT", "/v1/runs/test/blobs/" + "0" * 64),
        ("POST", "/v1/runs/test/scores"),
        ("POST", "/v1/runs/test/audits/claim"),
        ("POST", "/v1/runs/test/steps/0/commit"),
        ("GET", "/v1/runs/test/submissions/" + "0" * 64),
    ],
)
def test_unsigned_requests_are_refused(house, method, path) -> None:
    response = send(house, method, path, body=b"{}")
    assert (response.status_code, code(response)) == (401, "bad-signature")


@pytest.mark.parametrize("role", ["trainer", "validator", "scorer"])
def test_a_role_must_be_granted(house, role) -> None:
    body = msgspec.json.encode(m.Register(version=m.VERSION, role=role))
    response = send(house, "POST", "/v1/nodes", body=body, key=house.named("eve"))
    assert (response.status_code, code(response)) == (403, "forbidden")
    assert house.rows(sa.select(NODES)) == []


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("PUT", "blobs/" + "0" * 64, None),
        ("POST", "scores/claim", m.Claim()),
        ("POST", "scores", m.Scores(results=[m.ScoreResult(rollout="r1", reward=1.0)])),
        ("POST", "audits/claim", m.Claim()),
        ("POST", "audits/a1/evidence", Signed("evidence", b"", b"", b"")),
        ("POST", "steps/1/claim", m.ClaimStep()),
        ("GET", "submissions/" + "0" * 64, None),
        ("GET", "submissions/" + "0" * 64 + "/logp", None),
    ],
)
def test_a_worker_gets_nowhere_on_the_routes_of_other_roles(house, method, path, message) -> None:
    started(house, "eve")
    body = b"" if message is None else msgspec.json.encode(message)
    response = send(house, method, f"{house.path}/{path}", body=body, key=house.named("eve"))
    assert (response.status_code, code(response)) == (403, "forbidden")


def test_a_key_that_never_registered_is_told_to(house) -> None:
    started(house)
    body = msgspec.json.encode(m.LeaseRequest())
    response = send(house, "POST", BATCH_ROUTE, body=body, key=house.named("nobody"))
    assert (response.status_code, code(response)) == (404, "not-found")
    assert "POST /v1/nodes first" in response.json()["detail"]


def test_a_signature_for_another_coordinator_or_path_or_query_is_refused(house) -> None:
    started(house, "eve")
    body = msgspec.json.encode(m.LeaseRequest())
    key = house.named("eve")
    for odd in ({"tag": "nother"}, {"signed_path": "/v1/runs/test/heartbeat"}):
        assert code(send(house, "POST", BATCH_ROUTE, body=body, key=key, **odd)) == "bad-signature"
    signed = _signature(house, key, "POST", BATCH_ROUTE, "", body, None)
    assert code(send(house, "POST", BATCH_ROUTE, body=body, headers=signed, query="x=1")) == "bad-signature"


def test_the_signature_covers_the_path_as_it_was_sent(house) -> None:
    """Percent-encoding is not undone before verifying, so no two paths share a signature."""
    started(house, "eve")
    body, odd = msgspec.json.encode(m.LeaseRequest()), "/v1/runs/t%65st/leases"
    key = house.named("eve")
    assert send(house, "POST", odd, body=body, key=key).status_code == 200
    assert code(send(house, "POST", odd, body=body, key=key, signed_path=BATCH_ROUTE)) == "bad-signature"


def test_a_replayed_request_and_an_old_one_are_refused(house) -> None:
    started(house, "eve")
    body = msgspec.json.encode(m.LeaseRequest())
    headers = _signature(house, house.named("eve"), "POST", BATCH_ROUTE, "", body, None)
    app = house.coordinator.app()

    async def twice():
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.post(BATCH_ROUTE, content=body, headers=headers) for _ in range(2)]

    first, second = asyncio.run(twice())
    assert (first.status_code, second.status_code, code(second)) == (200, 401, "replayed")
    house.clock.now += 61
    assert code(send(house, "POST", BATCH_ROUTE, body=body, headers=headers)) == "clock-skew"


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("signature-input", "sig1=()"),
        ("signature-input", 'sig1=("@method");created=1'),
        ("signature", "sig1=:AAAA:"),
        ("signature", ""),
        ("content-digest", "sha-256=:AAAA:"),
        ("signature-input", "é" * 40),
        ("content-length", "-1"),
        ("content-length", "9" * 30),
    ],
)
def test_broken_headers_are_no_crash(house, header, value) -> None:
    started(house, "eve")
    body = msgspec.json.encode(m.LeaseRequest())
    headers = _signature(house, house.named("eve"), "POST", BATCH_ROUTE, "", body, None)
    response = send(house, "POST", BATCH_ROUTE, body=body, headers=headers | {header: value.encode("latin-1")})
    assert response.status_code in (400, 401, 413)


def test_a_key_id_of_letters_that_are_no_ascii_is_no_crash(house) -> None:
    headers = _signature(house, house.named("eve"), "POST", BATCH_ROUTE, "", b"", None)
    before, _, rest = headers["signature-input"].partition('keyid="')
    odd = (before + 'keyid="' + "é" * 43 + rest[43:]).encode("latin-1")
    response = send(house, "POST", BATCH_ROUTE, headers=headers | {"signature-input": odd})
    assert (response.status_code, code(response)) == (401, "bad-signature")


# --- bodies and paths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b'{"slots": 0}',
        b'{"slots": 1e99}',
        b'{"slots": 99999999999999999999999999}',
        b'{"wait_s": 31}',
        b'{"wait_s": NaN}',
        b'{"unknown": 1}',
        b'{"context": -1}',
        b'{"memory_bytes": 9223372036854775808}',
        b'{"loaded_step": 9223372036854775808}',
        b"[" * 60_000,
        b'{"slots": "\xff"}',
        b'{"slots": "\\ud800"}',
    ],
)
def test_malformed_json(house, body) -> None:
    response = send(house, "POST", BATCH_ROUTE, body=body, key=house.named("eve"))
    assert (response.status_code, code(response)) == (400, "malformed")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("leases", {"wait_s": math.nan}),
        ("leases", {"wait_s": math.inf}),
        ("leases", {"slots": 2**64 - 1}),
        ("heartbeat", {"cpu_s": math.nan}),
        ("heartbeat", {"work_cpu_s": -math.inf}),
        ("heartbeat", {"loaded_step": -(2**63)}),
        ("heartbeat", {"phase": "a\n"}),
        ("heartbeat", {"phase": "\x1b[31m"}),
        ("heartbeat", {"phase": "x" * 81}),
    ],
)
def test_malformed_msgpack(house, kind, fields) -> None:
    started(house, "eve")
    body = msgspec.msgpack.encode(fields)
    headers = {"content-type": wire.MSGPACK}
    response = send(house, "POST", f"{house.path}/{kind}", body=body, headers=headers, key=house.named("eve"))
    assert (response.status_code, code(response)) == (400, "malformed")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x" * 500])
def test_other_content_types_are_named_and_refused(house, kind) -> None:
    response = send(house, "POST", BATCH_ROUTE, body=b"{}", headers={"content-type": kind}, key=house.named("eve"))
    assert (response.status_code, code(response)) == (400, "malformed")
    assert len(response.content) < 1000


def test_a_packed_body_is_not_unpacked(house) -> None:
    import gzip

    headers = {"content-encoding": "gzip"}
    response = send(
        house, "POST", BATCH_ROUTE, body=gzip.compress(b"{}" * 1000), headers=headers, key=house.named("eve")
    )
    assert (response.status_code, code(response)) == (400, "malformed")


def test_a_body_over_the_cap_is_refused_declared_or_not(house) -> None:
    big = b"x" * 70_000
    assert code(send(house, "POST", BATCH_ROUTE, body=big, key=house.named("eve"))) == "too-large"

    async def pieces():
        for _ in range(70):
            yield b"x" * 1000

    async def chunked(headers):
        transport = httpx2.ASGITransport(app=house.coordinator.app())
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(BATCH_ROUTE, content=pieces(), headers=headers)

    signed = _signature(house, house.named("eve"), "POST", BATCH_ROUTE, "", b"x" * 70_000, None)
    response = asyncio.run(chunked(signed))
    assert (response.status_code, code(response)) == (413, "too-large")


@pytest.mark.parametrize("route", ["blobs/" + "0" * 64, "steps/1/commit", "audits/a1/evidence", "scores"])
def test_nothing_of_a_large_body_is_read_before_the_key_may_send_it(house, route) -> None:
    read = 0

    async def body():
        nonlocal read
        for _ in range(1000):
            read += 1 << 16
            yield b"x" * (1 << 16)

    async def go(headers):
        transport = httpx2.ASGITransport(app=house.coordinator.app())
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            method = "PUT" if route.startswith("blobs") else "POST"
            return await client.request(method, f"{house.path}/{route}", content=body(), headers=headers)

    method = "PUT" if route.startswith("blobs") else "POST"
    signed = _signature(house, house.named("eve"), method, f"{house.path}/{route}", "", b"", None)
    assert [asyncio.run(go(headers)).status_code for headers in ({}, signed)] == [401, 403]
    assert read <= 2 << 16


def test_a_submission_may_be_no_larger_than_its_lease_can_fill(house) -> None:
    async def scene():
        await house.step(0)
        lease = await house.lease("eve")
        return f"{house.path}/leases/{lease.lease}/submission"

    path = asyncio.run(scene())
    assert code(send(house, "POST", path, body=b"x" * 100_000, key=house.named("eve"))) == "too-large"
    assert code(send(house, "POST", path, body=b"x" * 100, key=house.named("bob"))) in ("not-found", "forbidden")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/story/%00",
        "/v1/story/%F0%9F%92%A9",
        "/v1/story/..%2F..%2Fetc%2Fpasswd",
        "/v1/story/" + "a" * 5000,
        "/v1/story/' OR 1=1 --",
        "/v1/blobs/..%2F..%2Ffarflung.db",
        "/v1/blobs/%2e%2e",
        "/v1/blobs/" + "A" * 64,
        "/v1/runs/other",
        "/v1/runs/other/status",
        "/v1/runs/test/manifests/" + "0" * 64,
        "/v1/",
        "/nowhere",
    ],
)
def test_odd_paths_are_not_found(house, path) -> None:
    assert send(house, "GET", path).status_code in (400, 404)


@pytest.mark.parametrize("path", ["/nowhere", "/v1/", "/v1"])
def test_an_odd_host_header_is_no_crash(house, path) -> None:
    assert send(house, "GET", path, headers={"host": "[::1"}).status_code == 421


@pytest.mark.parametrize("path", ["/v1", "/v1/runs/test/status", "/metrics", "/", "/story/test", "/static/style.css"])
def test_a_name_that_a_stranger_points_here_reads_nothing(house, path) -> None:
    """DNS rebinding: a page of evil.example has its name point to this machine and asks on."""
    refused = send(house, "GET", path, headers={"host": "evil.example:8000"})
    assert (refused.status_code, code(refused)) == (421, "misdirected")
    assert "coordinator.hosts" in refused.json()["detail"]
    for host in ("127.0.0.1:8000", "[::1]:8000", "localhost", "box.localhost:1", "coordinator:8000", "203.0.113.5"):
        assert send(house, "GET", path, headers={"host": host}).status_code == 200, host


def test_a_coordinator_answers_to_the_names_that_it_is_given(make_house) -> None:
    named = make_house(coordinator={"hosts": ["run.example.org"], "proxies": ["*"]})
    assert send(named, "GET", "/v1", headers={"host": "Run.Example.Org.:443"}).status_code == 200
    assert send(named, "GET", "/v1", headers={"host": "evil.example"}).status_code == 421
    behind = make_house(coordinator={"proxies": ["10.0.0.1"]})
    assert send(behind, "GET", "/v1", headers={"host": "run.example.org"}).status_code == 200


def test_nobody_is_told_where_on_the_operators_disk_things_are(house) -> None:
    started(house)
    folder = str(house.config.folder.parent.parent)
    assert house.config.model.path.startswith("/")
    status = send(house, "GET", f"{house.path}/status")
    assert status.json()["model"] == "base"
    for path in (f"{house.path}/status", "/", "/story/test", "/story/test-step-0"):
        transport = httpx2.ASGITransport(app=house.coordinator.app())

        async def ask(path=path, transport=transport):
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
                return (await client.get(path)).text

        text = asyncio.run(ask())
        assert folder not in text, path
        assert house.config.model.path not in text, path


def test_wrong_methods_and_numbers(house) -> None:
    assert code(send(house, "DELETE", "/v1")) == "no-such-method"
    body = msgspec.json.encode(m.ClaimStep())
    for step in ("-1", "1e3", "9" * 12, "%D9%A1"):
        path = f"{house.path}/steps/{step}/claim"
        assert send(house, "POST", path, body=body, key=house.named("trainer")).status_code in (400, 404)


@pytest.mark.parametrize(
    ("asked", "status", "size", "content_range"),
    [
        ("", 200, 10, None),
        ("bytes=0-", 200, 10, None),
        ("bytes=3-", 206, 7, "bytes 3-9/10"),
        ("bytes=3-5", 206, 3, "bytes 3-5/10"),
        ("bytes=0-999999999999999999", 200, 10, None),
        ("bytes=9-9", 206, 1, "bytes 9-9/10"),
        ("bytes=10-", 416, 0, None),
        ("bytes=999999999999999999-", 416, 0, None),
        ("bytes=5-3", 416, 0, None),
        ("bytes=-3", 200, 10, None),
        ("bytes=0-1,3-4", 200, 10, None),
        ("lines=1-2", 200, 10, None),
        ("bytes=" + "9" * 50 + "-", 200, 10, None),
    ],
)
def test_ranges_of_a_blob(house, asked, status, size, content_range) -> None:
    digest = asyncio.run(house.ctx.blobs.put(b"0123456789"))
    response = send(house, "GET", f"/v1/blobs/{digest}", headers={"range": asked} if asked else {})
    assert response.status_code == status
    if status < 400:
        assert (len(response.content), response.headers.get("content-range")) == (size, content_range)


def test_an_empty_blob_can_be_had_whole_and_in_no_other_way(house) -> None:
    digest = asyncio.run(house.ctx.blobs.put(b""))
    whole = send(house, "GET", f"/v1/blobs/{digest}")
    assert (whole.status_code, whole.content) == (200, b"")
    assert code(send(house, "GET", f"/v1/blobs/{digest}", headers={"range": "bytes=0-"})) == "out-of-range"


def test_what_breaks_inside_is_a_problem_that_tells_nothing(house, caplog) -> None:
    started(house)
    with house.ctx.database.engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE verdicts"))
    with caplog.at_level(logging.ERROR):
        response = send(house, "GET", "/v1/runs/test/status")
    assert (response.status_code, code(response)) == (500, "broken")
    assert "verdicts" not in response.text
    assert "verdicts" in caplog.text


# --- workers with the source in hand ---------------------------------------------------------------------------------


def forged(kind: str, lease: m.Lease, honest: m.Submission) -> m.Submission:
    first, *rest = honest.rollouts
    ids = wire.unpack_ids(first.ids).tolist()
    swap = {
        "none of them": [],
        "one missing": rest,
        "one twice": [first, first, *rest[1:]],
        "somebody else's": [m.SubmittedRollout(rollout="r000000000000", ids=first.ids), *rest],
        "no tokens": [m.SubmittedRollout(rollout=first.rollout, ids=b""), *rest],
        "half a token": [m.SubmittedRollout(rollout=first.rollout, ids=first.ids + b"\0"), *rest],
        "no such token": [m.SubmittedRollout(rollout=first.rollout, ids=wire.pack_ids([32, 2])), *rest],
        "a huge token": [m.SubmittedRollout(rollout=first.rollout, ids=b"\xff" * 8), *rest],
        "goes on after the end": [m.SubmittedRollout(rollout=first.rollout, ids=wire.pack_ids([2, *ids])), *rest],
        "stops early": [m.SubmittedRollout(rollout=first.rollout, ids=wire.pack_ids([5, 6])), *rest],
        "over max_new_tokens": [m.SubmittedRollout(rollout=first.rollout, ids=wire.pack_ids([5] * 9)), *rest],
    }
    return msgspec.structs.replace(honest, rollouts=swap[kind])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none of them", "malformed"),
        ("one missing", "rejected"),
        ("one twice", "rejected"),
        ("somebody else's", "rejected"),
        ("no tokens", "rejected"),
        ("half a token", "malformed"),
        ("no such token", "rejected"),
        ("a huge token", "rejected"),
        ("goes on after the end", "rejected"),
        ("stops early", "rejected"),
        ("over max_new_tokens", "rejected"),
    ],
)
def test_a_submission_that_fails_sanity_is_refused_and_may_be_mended(house, kind, expected) -> None:
    lease = started(house, "eve")["eve"]
    body = msgspec.json.encode(forged(kind, lease, house.honest(lease)))
    response = send(house, "POST", submission_path(lease), body=body, key=house.named("eve"))
    assert (400 <= response.status_code < 500, code(response)) == (True, expected)
    assert house.statuses(LEASES) == {"open": 1}
    assert house.rows(sa.select(SUBMISSIONS)) == []

    async def mended(house) -> None:
        await house.submit("eve", lease)

    house.run(mended)


@pytest.mark.parametrize(
    "fields",
    [
        {"generate_s": math.nan},
        {"generate_s": -1.0},
        {"logp": [b"\0\0\xc0\x7f"] * 4},
        {"logp": [b""]},
        {"logp": [b"\0" * 4] * 4},
    ],
)
def test_odd_metrics_are_refused(house, fields) -> None:
    lease = started(house, "eve")["eve"]
    body = msgspec.msgpack.encode(msgspec.structs.replace(house.honest(lease), **fields))
    headers = {"content-type": wire.MSGPACK}
    response = send(house, "POST", submission_path(lease), body=body, headers=headers, key=house.named("eve"))
    assert code(response) in ("malformed", "rejected")
    assert house.statuses(LEASES) == {"open": 1}


def test_a_lease_is_its_owners_alone(house) -> None:
    leases = started(house, "ada", "eve")
    lease = leases["ada"]
    for path, message in (
        (submission_path(lease), house.honest(lease)),
        (f"{BATCH_ROUTE}/{lease.lease}/return", m.Empty()),
    ):
        response = send(house, "POST", path, body=msgspec.json.encode(message), key=house.named("eve"))
        assert (response.status_code, code(response)) == (403, "forbidden")
    assert house.statuses(LEASES) == {"open": 2}


def test_the_first_submission_is_final_and_others_leave_no_blobs(house) -> None:
    lease = started(house, "eve")["eve"]

    async def scenario(house) -> None:
        await house.submit("eve", lease)
        before = _blobs(house)
        for number in range(3):
            other = house.honest(lease)
            ids = wire.pack_ids([5 + number, 2])
            other.rollouts[0] = m.SubmittedRollout(rollout=other.rollouts[0].rollout, ids=ids)
            with pytest.raises(errors.LeaseGone):
                await house.submit("eve", lease, other)
            size = [len(wire.unpack_ids(r.ids)) for r in house.honest(lease).rollouts]
            logp = [wire.pack_floats([-float(number)] * n) for n in size]
            await house.submit("eve", lease, house.honest(lease, logp=logp))
        assert _blobs(house) == before

    house.run(scenario)


def _blobs(house) -> int:
    return sum(1 for path in (house.config.folder / "blobs").rglob("*") if path.is_file())


def test_the_same_submission_twice_at_once_counts_once(house) -> None:
    lease = started(house, "ada")["ada"]

    async def scenario(house) -> None:
        receipts = await asyncio.gather(*(house.submit("ada", lease) for _ in range(5)))
        assert len({receipt.submission for receipt in receipts}) == 1
        assert len(house.rows(sa.select(SUBMISSIONS))) == 1
        assert house.row(NODES, house.named("ada").id).status == "probation"

    house.run(scenario)


def test_two_submissions_at_once_are_one_and_a_refusal(house) -> None:
    lease = started(house, "eve")["eve"]

    async def scenario(house) -> None:
        answers = await asyncio.gather(
            house.submit("eve", lease),
            house.submit("eve", lease, house.honest(lease, keep=2)),
            return_exceptions=True,
        )
        assert sorted(type(answer).__name__ for answer in answers) == ["LeaseGone", "Receipt"]
        assert house.statuses(AUDITS) == {"open": 1}

    house.run(scenario)


def test_many_requests_for_work_at_once_are_one_lease(house) -> None:
    started(house)

    async def scenario(house) -> None:
        await house.client("eve")
        leases = await asyncio.gather(*(house.lease("eve") for _ in range(8)))
        assert len({lease.lease for lease in leases}) == 1

    house.run(scenario)


def test_samples_asked_for_at_once_go_to_one_node_each(house) -> None:
    started(house)

    async def scenario(house) -> None:
        names = [f"n{number}" for number in range(4)]
        await asyncio.gather(*(house.client(name) for name in names))
        leases = await asyncio.gather(*(house.lease(name) for name in names))
        samples = [(g.group, s.index) for lease in leases for g in lease.groups for s in g.samples]
        assert len(set(samples)) == len(samples) == 16

    house.run(scenario)


@pytest.mark.parametrize("role", ["worker", "relay"])
def test_an_ejected_key_is_out_in_every_role(house, role) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.work("eve", 3)
        await house.audit(lambda rollout: True)
        eve, url = house.clients["eve"], "http://8.8.8.8:80" if role == "relay" else ""
        with pytest.raises(errors.Ejected, match="GET /v1/story/"):
            await eve.post("/v1/nodes", m.Register(version=m.VERSION, role=role, url=url), m.Welcome)
        with pytest.raises(errors.Ejected):
            await house.lease("eve")
        assert house.row(NODES, house.named("eve").id).status == "ejected"
        assert not (await eve.get(f"{house.path}/relays", m.Relays)).relays

    house.run(scenario)


def test_a_relay_whose_key_is_ejected_is_no_longer_listed(house) -> None:
    relay = m.Register(version=m.VERSION, role="relay", url="http://8.8.8.8:80")

    async def scenario(house) -> None:
        await house.step(0)
        eve = await house.client("eve")
        await eve.post("/v1/nodes", relay, m.Welcome)
        assert len((await eve.get(f"{house.path}/relays", m.Relays)).relays) == 1
        eject = m.Rollback(to_step=0, without=[eve.key.id])
        await house.line("coordinator").post(f"{house.admin_path}/rollback", eject, m.Done)
        assert not (await eve.get(f"{house.path}/relays", m.Relays)).relays
        with pytest.raises(errors.Ejected):
            await house.lease("eve")

    house.run(scenario)


def test_changing_its_role_gets_a_granted_key_no_unaudited_training(house) -> None:
    """A validator's evaluations are not audited; what it generates as a worker is, whatever it calls itself by then."""

    async def scenario(house) -> None:
        await house.step(0)
        turncoat = await house.client("val-2")
        await turncoat.post("/v1/nodes", m.Register(version=m.VERSION, role="worker"), m.Welcome)
        lease = await house.lease("val-2")
        assert lease.purpose == "train"
        back = m.Register(version=m.VERSION, role="validator")
        with pytest.raises(errors.Conflict, match="before you change"):
            await turncoat.post("/v1/nodes", back, m.Welcome)
        await house.submit("val-2", lease)
        await turncoat.post("/v1/nodes", back, m.Welcome)
        assert house.statuses(AUDITS) == {"open": 1}
        assert house.statuses(ROLLOUTS, lease=lease.lease) == {"held": 4}

    house.run(scenario)


def test_a_node_does_not_choose_between_two_profiles_once_it_has_seen_both_texts(house) -> None:
    """A sample has one text under each quantiser: who may change while it holds a lease hands in the better one."""
    other = msgspec.structs.replace(house.ctx.profiles.run, name="small", bits=8, quantiser="int8")
    house.ctx.profiles = Profiles(house.ctx.profiles.run, (other,))

    async def scenario(house) -> None:
        await house.step(0)
        eve = await house.client("eve")
        lease = await house.lease("eve")
        small = m.Register(version=m.VERSION, profile="small")
        with pytest.raises(errors.Conflict, match="before you change"):
            await eve.post("/v1/nodes", small, m.Welcome)
        await house.submit("eve", lease)
        await eve.post("/v1/nodes", small, m.Welcome)
        (kept,) = house.rows(sa.select(SUBMISSIONS.c.profile).where(SUBMISSIONS.c.node == house.named("eve").id))
        assert kept.profile in ("", house.ctx.profiles.run.name)

    house.run(scenario)


def test_evidence_must_be_about_what_was_drawn(house) -> None:
    started(house)

    async def scenario(house) -> None:
        await house.work("ada")
        (job,) = await house.claim_audits()
        good = house.evidence(job, lambda rollout: False)
        one, *others = good.rollouts
        nan = msgspec.structs.replace(one, margin=wire.pack_floats([math.nan] * (len(one.margin) // 4)))
        short = msgspec.structs.replace(one, gap=one.gap[:-4], margin=one.margin[:-4])
        for odd in (
            house.evidence(job, lambda rollout: False, manifest="0" * 64),
            house.evidence(job, lambda rollout: False, profile="int8"),
            house.evidence(job, lambda rollout: False, arithmetic="bfloat16"),
            house.evidence(job, lambda rollout: False, rollouts=[one]),
            house.evidence(job, lambda rollout: False, rollouts=[one, one, *others[1:]]),
            house.evidence(job, lambda rollout: False, rollouts=[nan, *others]),
            house.evidence(job, lambda rollout: False, rollouts=[short, *others]),
        ):
            signed = seal(house.named("val-1"), "evidence", odd)
            with pytest.raises(errors.Malformed):
                await house.tell("val-1", f"audits/{job.audit}/evidence", signed, m.Done)
        tampered = msgspec.structs.replace(seal(house.named("val-1"), "evidence", good), payload=b"\x80")
        with pytest.raises(errors.BadSignature):
            await house.tell("val-1", f"audits/{job.audit}/evidence", tampered, m.Done)
        assert house.statuses(AUDITS) == {"claimed": 1}
        assert await house.testify(job, lambda rollout: False) == 1

    house.run(scenario)


def test_a_manifest_of_anybody_but_the_trainer_or_without_its_shards_is_refused(house) -> None:
    async def scenario(house) -> None:
        batch = await house.claim_step(0)
        signed, data, digest = await house.manifest(batch)
        commit = m.Commit(manifest=signed, metrics={})
        with pytest.raises(errors.NotFound, match="no blob"):
            await house.tell("trainer", "steps/0/commit", commit, m.Done)
        trainer = await house.client("trainer")
        with pytest.raises(errors.Malformed, match="hashes to"):
            await trainer.put(f"{house.path}/blobs/{digest}", b"other bytes")
        await trainer.put(f"{house.path}/blobs/{digest}", data)
        payload = msgspec.msgpack.decode(signed.payload, type=m.Manifest)
        forged = m.Commit(manifest=seal(house.named("eve"), "manifest", payload), metrics={})
        with pytest.raises(errors.BadSignature):
            await house.tell("trainer", "steps/0/commit", forged, m.Done)
        with pytest.raises(errors.Malformed, match="of step 0, the path of 1"):
            await house.tell("trainer", "steps/1/commit", commit, m.Done)
        await house.tell("trainer", "steps/0/commit", commit, m.Done)

    house.run(scenario)


def test_a_metric_gone_wild_does_not_stop_the_run(house) -> None:
    """The mismatch metric follows from log-probabilities that workers send: it may be infinite."""

    async def scenario(house) -> None:
        batch = await house.claim_step(0)
        signed, data, digest = await house.manifest(batch)
        await (await house.client("trainer")).put(f"{house.path}/blobs/{digest}", data)
        metrics = {"loss": 0.5, "mismatch_kl": math.inf, "entropy": math.nan}
        await house.tell("trainer", "steps/0/commit", m.Commit(manifest=signed, metrics=metrics), m.Done)
        assert "Infinity" not in (house.config.folder / "metrics.jsonl").read_text()
        await house.line("anyone").get("/v1/runs/test/status", m.Status)

    house.run(scenario)


def test_a_floods_nonces_are_forgotten_in_time(house) -> None:
    from farflung.net.server import Nonces

    nonces = Nonces(limit=3)
    for number in range(3):
        nonces.check(f"n{number}", 0.0)
    with pytest.raises(errors.Replayed):
        nonces.check("n0", 1.0)
    with pytest.raises(errors.Unavailable):
        nonces.check("n3", 1.0)
    nonces.check("n3", 121.0)
    assert len(nonces._seen) == 1


# --- a coordinator that lies to a worker -----------------------------------------------------------------------------


def liar(answer) -> httpx2.MockTransport:
    return httpx2.MockTransport(lambda request: answer)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (httpx2.Response(200, content=b"\xc1"), errors.Malformed),
        (httpx2.Response(200, content=b""), errors.Malformed),
        (httpx2.Response(302, headers={"location": "http://elsewhere/"}), errors.Malformed),
        (httpx2.Response(404, content=b"<html>"), errors.Malformed),
        (httpx2.Response(404, content=b'{"code": "ejected", "detail": "so I say"}'), errors.Ejected),
        (httpx2.Response(503, headers={"retry-after": b"\xb2"}), errors.Unavailable),
        (httpx2.Response(503, headers={"retry-after": "9" * 400}), errors.Unavailable),
        (httpx2.Response(200, headers={"content-encoding": "gzip"}, content=b""), errors.FarflungError),
    ],
)
def test_whatever_a_coordinator_answers_is_an_error_of_ours(house, answer, error) -> None:
    async def ask() -> None:
        client = Client("http://test", house.named("ada"), patience_s=0.0, transport=liar(answer), clock=house.clock)
        with pytest.raises(error):
            await client.get("/v1/runs/test/status", m.Status)
        await client.close()

    asyncio.run(ask())


def test_an_answer_without_end_is_cut_off(house) -> None:
    async def pieces():
        while True:
            yield b"x" * 1000

    async def ask() -> None:
        transport = liar(httpx2.Response(200, content=pieces()))
        client = Client("http://test", house.named("ada"), patience_s=0.0, transport=transport, clock=house.clock)
        with pytest.raises(errors.TooLarge):
            await client.download("/v1/blobs/" + "0" * 64, limit_bytes=10_000)
        await client.close()

    asyncio.run(ask())


def test_a_coordinator_that_goes_by_the_name_of_another_is_found_out(house, monkeypatch) -> None:
    """It would pass on what the node signs to the one whose name it borrowed, and spoil the node's record there."""

    async def join(tag: str) -> None:
        real = node_routes.index

        async def index(ctx, call):
            return msgspec.structs.replace(await real(ctx, call), coordinator=tag)

        monkeypatch.setattr(node_routes, "index", index)
        client = house.line("ada")
        with pytest.raises(errors.BadSignature, match="calls itself nsomebodyelse"):
            await Session.open(client, "worker", root=house.named("root").public)
        await client.close()

    asyncio.run(join("nsomebodyelse"))


def test_another_root_than_that_of_the_address_is_refused(house) -> None:
    async def join() -> None:
        client = house.line("ada")
        with pytest.raises(errors.BadSignature, match="is vouched for by root"):
            await Session.open(client, "worker", root=house.named("eve").public)
        await client.close()

    asyncio.run(join())


# --- credit ----------------------------------------------------------------------------------------------------------


def test_what_a_worker_says_of_itself_changes_neither_ledger_nor_batch(make_house) -> None:
    """Log-probabilities, timings and heartbeats at random: the trainer gets the same batch, the node the same pay."""
    import random

    seen = []
    for seed in (None, 1, 2):
        house = make_house()
        rng = random.Random(seed)

        async def scenario(house, seed=seed, rng=rng) -> None:
            await house.step(0)
            for _ in range(2):
                lease = await house.lease("ada")
                fields = {}
                if seed is not None:
                    sizes = [len(r.ids) // 4 for r in house.honest(lease).rollouts]
                    logp = [wire.pack_floats([rng.uniform(-1e30, 1e30) for _ in range(n)]) for n in sizes]
                    fields = {"logp": logp, "generate_s": rng.uniform(0, 1e12)}
                    beat = m.Heartbeat(cpu_s=rng.uniform(0, 1e12), work_cpu_s=rng.uniform(0, 1e12), loaded_step=9)
                    await house.tell("ada", "heartbeat", beat, m.HeartbeatReply)
                await house.submit("ada", lease, house.honest(lease, **fields))
            await house.audit()
            await house.score()
            batch = await house.step(1)
            groups = [(g.step, g.prompt_ids, [(r.sample, r.reward) for r in g.rollouts]) for g in batch.groups]
            seen.append((groups, house.balance(ledger.escrow(house.named("ada").id))))

        house.run(scenario)
    assert seen[0] == seen[1] == seen[2]


def test_inspect_is_what_the_route_runs(house) -> None:
    lease = started(house, "ada")["ada"]
    valid = inspect(lease, house.named("ada").id, house.honest(lease), 32, frozenset({2}))
    assert sum(valid.tokens.values()) == sum(len(r.ids) // 4 for r in house.honest(lease).rollouts)
