"""A real coordinator in this process: SQLite and blobs in a temporary folder, its HTTP application, a clock to turn.

`found_run` founds one run for the whole session; `house` copies it, so every test has a database of its own.
"""

import asyncio
import hashlib
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import settings

from farflung.config import Config
from farflung.coordinator import Coordinator
from farflung.coordinator.context import Context
from farflung.net.admin import read_token
from farflung.net.client import Client
from farflung.net.session import PURPOSES, delegate
from farflung.protocol import messages as m
from farflung.protocol import states, wire
from farflung.protocol.digest import digest_of
from farflung.protocol.identity import Key, Signed, seal, unseal
from farflung.rollouts.archive import Archive
from farflung.store import counts, ledger
from farflung.store.blobs import Blobs
from farflung.store.db import Database, migrate
from farflung.store.metrics import Metrics
from farflung.store.run import RunContext
from farflung.store.tables import ENTRIES, EVENTS, GROUPS, LEASES, LIVE_ROLLOUT, NODES, ROLLOUTS, STEPS, TABLE_OF
from farflung.tasks.create_run import Model, create_run, seal_descriptor, weights_key
from farflung.tasks.keyring import Keyring
from farflung.trust.evidence import Profile, Profiles, Tally, from_json
from farflung.weights.manifest import target_digest

settings.register_profile("farflung", deadline=None)  # shared cores pause for half a second now and then
settings.load_profile("farflung")

BASE = Path(__file__).parents[1] / "examples" / "base"
RUN, EOS, VOCAB, BUDGET, SAMPLES = "test", 2, 32, 8, 4
START = 1_800_000_000.0
PATH = f"/v1/runs/{RUN}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes a `device` runs on the CPU, on the second one that stands for a GPU, and on a GPU if any."""
    if "device" in metafunc.fixturenames:
        from second_device import DEVICES  # torch takes seconds, and most tests do without

        metafunc.parametrize("device", DEVICES)


def named(name: str) -> Key:
    """A key that follows from its name."""
    return Key(hashlib.sha256(name.encode()).digest())


def ring(config: Config) -> Keyring:
    """The root's word for the keys of a run; one key signs all but weights."""
    root, run = named("root"), config.run.name
    publics = dict.fromkeys(PURPOSES, named("coordinator").public) | {"weights": weights_key(config)}
    return Keyring(root.public, tuple(delegate(root, run, purpose, publics[purpose], 4e9) for purpose in PURPOSES))


CPU = {"numerics": m.Numerics(engine="torch", device="cpu", arithmetic="float32", bits=32), "verified_in": ("float32",)}
"""What a calibration is of."""
FP32 = CPU["numerics"].fields | {"verified_in": ("float32",)}
"""The same as the fields of a profile."""
PROFILE = Profiles(Profile("torch-cpu-fp32", (1.0,), (0.5, 0.001), Tally((1, 1), (0, 0)), **FP32))
"""Beyond a gap of 1 a flip is worth a factor of 500."""
GRANTS = {"trainer": "trainer", "scorer": "scorer", "val-1": "validator", "val-2": "validator"}


def settings(folder: Path, **changes: dict[str, Any]) -> Config:
    """A small run: groups of four samples, two groups a step, leases of four rollouts."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": RUN, "dir": str(folder), "steps": 3, "reproducible": True},
        "model": {"path": str(BASE)},
        "env": {"name": "sums", "train_tasks": 64, "eval_tasks": 4},
        "generate": {"samples": SAMPLES, "max_new_tokens": BUDGET},
        "learn": {"groups": 2, "max_staleness": 2},
        "lease": {"rollouts": 4, "target_s": 0.0, "lease_s": 100.0, "lost_s": 40.0, "heartbeat_s": 5.0},
        "trust": {"probation_rollouts": 4, "probation_waiting": 99},
        "eval": {"tasks": 2, "every": 0, "samples": 0},
        "coordinator": {"grants": {named(name).public.hex(): role for name, role in GRANTS.items()}, "redact": False},
    }
    for section, values in changes.items():
        tree[section] = tree[section] | values
    return Config.model_validate(tree)


@pytest.fixture(scope="session")
def found_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the database and blobs of a run that was just founded."""
    folder = tmp_path_factory.mktemp("founded")
    config = settings(folder)
    config.folder.mkdir()
    migrate(config.database_url)

    async def make() -> None:
        database, model = Database(config.database_url), Model(config.model.path)
        await create_run(config, database, model, named("coordinator"), START)
        await seal_descriptor(config, Blobs(config.blobs_url), model, named("coordinator"), ring(config), PROFILE)
        database.close()

    asyncio.run(make())
    return folder


@pytest.fixture
def place() -> Callable[[], dict[str, str]]:
    """Settings of database and blobs for each coordinator; here the embedded ones, in tests/contract every kind."""
    return dict


@pytest.fixture
def make_house(
    found_run: Path, tmp_path: Path, place: Callable[[], dict[str, str]]
) -> Iterable[Callable[..., "House"]]:
    """Builds coordinators over copies of the founded run; sections of the settings may be changed."""
    houses: list[House] = []

    def make(**changes: dict[str, Any]) -> House:
        folder = tmp_path / str(len(houses))
        shutil.copytree(found_run, folder)
        coordinator = place() | changes.pop("coordinator", {})
        houses.append(asyncio.run(House.open(settings(folder, coordinator=coordinator, **changes))))
        return houses[-1]

    yield make
    for house in houses:
        house.close()


@pytest.fixture
def house(make_house: Callable[..., "House"]) -> "House":
    """One coordinator with the settings above."""
    return make_house()


# --- what a worker and a validator say ---------------------------------------------------------------------------


def tokens_of(seed: int) -> list[int]:
    """A rollout as if generated: of a length that follows from the seed, ended by the end token or by its limit."""
    rng = np.random.default_rng(seed)
    length = int(rng.integers(2, BUDGET + 1))
    ids = rng.integers(3, VOCAB, size=length).tolist()
    return ids if length == BUDGET else [*ids[:-1], EOS]


def honest(lease: m.Lease, *, keep: int | None = None, **fields: Any) -> m.Submission:
    """A submission whose tokens follow from the seeds; of the first `keep` samples only, if given."""
    samples = [sample for group in lease.groups for sample in group.samples]
    kept = samples if keep is None else samples[:keep]
    rollouts = [m.SubmittedRollout(rollout=s.rollout, ids=wire.pack_ids(tokens_of(s.seed))) for s in kept]
    return m.Submission(rollouts=rollouts, partial=len(kept) < len(samples), **fields)


def evidence(job: m.AuditJob, bad: Callable[[str], bool], **changes: Any) -> m.Evidence:
    """What a validator saw: clear choices, all of them the seed's unless the rollout is bad."""
    seen: list[m.RolloutEvidence] = []
    for rollout in job.rollouts:
        size = len(rollout.ids) // 4
        margin = np.full(size, 1.0 if bad(rollout.rollout) else 0.0)
        gap = wire.pack_floats(np.full(size, 1.5))
        pick = wire.pack_floats(np.full(size, 0.5))
        floats = {
            "gap": gap,
            "margin": wire.pack_floats(margin),
            "pick": pick,
            "lead": wire.pack_floats(np.full(size, -1.0)),
        }
        seen.append(m.RolloutEvidence(rollout=rollout.rollout, **floats))
    fields = {"run": RUN, "audit": job.audit, "manifest": job.manifest, "profile": from_json(job.profile).name}
    fields |= {"rollouts": seen}
    return m.Evidence(**fields | {"arithmetic": job.verify_in[0]} | changes)


@dataclass
class Clock:
    """Time stands still until a test moves it."""

    now: float = START

    def __call__(self) -> float:
        return self.now


@dataclass
class House:
    """A coordinator, and hands to do with it what workers, scorers, validators and a trainer do."""

    config: Config
    coordinator: Coordinator
    clock: Clock
    clients: dict[str, Client] = field(default_factory=dict)
    named = staticmethod(named)
    honest = staticmethod(honest)
    evidence = staticmethod(evidence)
    path = PATH
    admin_path = f"/v1/admin/runs/{RUN}"

    @classmethod
    async def open(cls, config: Config, clock: Clock | None = None) -> "House":
        """A coordinator over what is in the configured folder. Opening it again is a restart."""
        clock, key, model = clock or Clock(), named("coordinator"), Model(config.model.path)
        if config.coordinator.database:
            migrate(config.database_url)
        database, blobs = Database(config.database_url), Blobs(config.blobs_url)
        run_ctx: RunContext = await create_run(config, database, model, key, clock())
        descriptor = await seal_descriptor(config, blobs, model, key, ring(config), PROFILE)
        archive = Archive(Blobs(config.submissions_url), model.tokenizer)
        metrics = Metrics(config.folder / "metrics.jsonl")
        parts = (run_ctx, descriptor, weights_key(config), PROFILE, archive, database, blobs, metrics, clock)
        token = read_token(config.coordinator.admin_token_file, {})
        return cls(config, Coordinator(Context(*parts, admin_token=token)), clock)

    @cached_property
    def app(self) -> Any:
        """The coordinator's HTTP application."""
        return self.coordinator.app()

    @property
    def ctx(self) -> Context:
        """What the coordinator's routes work with."""
        return self.coordinator.ctx

    def close(self) -> None:
        """Let go of the database."""
        self.ctx.database.close()

    def run(self, scenario: Callable[["House"], Awaitable[None]]) -> None:
        """Play a scenario on an event loop of its own, then look whether all is in order."""

        async def play() -> None:
            await scenario(self)
            for client in self.clients.values():
                await client.close()
            self.clients.clear()

        asyncio.run(play())
        self.check()

    # --- who -----------------------------------------------------------------------------------------------------

    def line(self, name: str, **options: Any) -> Client:
        """A client with the key of this name, not registered."""
        options = {"transport": httpx2.ASGITransport(app=self.app)} | options
        return Client("http://test", named(name), self.ctx.run_ctx.key.id, patience_s=0.0, clock=self.clock, **options)

    async def client(self, name: str) -> Client:
        """A registered node: its role follows from its name."""
        if name not in self.clients:
            self.clients[name] = self.line(name)
            register = m.Register(version=m.VERSION, name=name, role=GRANTS.get(name, "worker"))  # type: ignore[arg-type]
            await self.clients[name].post("/v1/nodes", register, m.Welcome)
        return self.clients[name]

    async def tell(self, name: str, path: str, message: Any, kind: Any) -> Any:
        """Post a message of a registered node to a path of the run."""
        return await (await self.client(name)).post(f"{PATH}/{path}", message, kind)

    # --- the worker ----------------------------------------------------------------------------------------------

    async def ask(self, name: str, **wishes: Any) -> m.Lease | None:
        """Ask for work."""
        wishes = {"loaded_step": -1, "slots": 64} | wishes
        answer = await self.tell(name, "leases", m.LeaseRequest(**wishes), m.LeaseAnswer)
        return None if answer.lease is None else unseal(answer.lease, "lease", m.Lease)

    async def lease(self, name: str, **wishes: Any) -> m.Lease:
        """Ask for work that must be there."""
        create_run = await self.ask(name, **wishes)
        assert create_run is not None, "no work for a worker"
        return create_run

    async def submit(self, name: str, lease: m.Lease, submission: m.Submission | None = None) -> m.Receipt:
        """Hand in tokens that follow from the seeds, or whatever is given."""
        path = f"leases/{lease.lease}/submission"
        self.clock.now += 0.01
        return unseal(await self.tell(name, path, submission or honest(lease), Signed), "receipt", m.Receipt)

    async def work(self, name: str, times: int = 1, **wishes: Any) -> list[m.Lease]:
        """Lease and submit."""
        leases: list[m.Lease] = []
        for _ in range(times):
            lease = await self.lease(name, **wishes)
            await self.submit(name, lease)
            leases.append(lease)
        return leases

    async def give_back(self, name: str, lease: m.Lease) -> None:
        """Hand a lease back."""
        await self.tell(name, f"leases/{lease.lease}/return", m.Empty(), m.Done)

    # --- those who judge -----------------------------------------------------------------------------------------

    async def claim_audits(self, name: str = "val-1", limit: int = 64) -> Sequence[m.AuditJob]:
        """Audits of one step."""
        return (await self.tell(name, "audits/claim", m.Claim(limit=limit), m.AuditJobs)).jobs

    async def testify(self, job: m.AuditJob, bad: Callable[[str], bool], name: str = "val-1") -> int:
        """Sign evidence in which the rollouts that `bad` names flip at every token."""
        signed = seal(named(name), "evidence", evidence(job, bad))
        return (await self.tell(name, f"audits/{job.audit}/evidence", signed, m.Done)).changed

    async def audit(self, bad: Callable[[str], bool] = lambda rollout: False, name: str = "val-1") -> int:
        """Answer every audit there is; gives how many."""
        count = 0
        while jobs := await self.claim_audits(name):
            for job in jobs:
                count += await self.testify(job, bad, name)
        return count

    async def score(self, reward: Callable[[str], float] | None = None, limit: int = 1024) -> int:
        """Reward everything that waits; by default every second sample of a group is right."""
        reward = reward or self.by_parity
        jobs = (await self.tell("scorer", "scores/claim", m.Claim(limit=limit), m.ScoreJobs)).jobs
        if not jobs:
            return 0
        results = [m.ScoreResult(rollout=job.rollout, reward=reward(job.rollout)) for job in jobs]
        return (await self.tell("scorer", "scores", m.Scores(results=results), m.Done)).changed

    def by_parity(self, rollout: str) -> float:
        """1 for odd samples, 0 for even ones."""
        return float(self.row(ROLLOUTS, rollout).sample % 2)

    # --- the trainer ---------------------------------------------------------------------------------------------

    async def claim_step(self, step: int) -> m.Batch | None:
        """Claim a step."""
        return (await self.tell("trainer", f"steps/{step}/claim", m.ClaimStep(), m.BatchAnswer)).batch

    async def commit(
        self,
        batch: m.Batch,
        *,
        weights: bytes = b"",
        probe: bytes = b"",
        probe_before: bytes = b"",
        canaries: bool = False,
        **changes: Any,
    ) -> int:
        """Publish weights that follow from the step, and commit. Without a probe no possession is asked for."""
        signed, data, digest = await self.manifest(batch, weights=weights, **changes)
        await (await self.client("trainer")).put(f"{PATH}/blobs/{digest}", data)
        figures = {"loss": 0.5}
        answers = [wire.pack_ids(tokens_of(canary.seed)) for canary in batch.canaries] if canaries else []
        message = m.Commit(
            manifest=signed,
            metrics=figures,
            checkpoint="",
            probe=probe,
            probe_before=probe_before,
            canaries=answers,
            canary_logp=[wire.pack_floats([-0.5] * (len(ids) // 4)) for ids in answers],
            restores=batch.restores,
        )
        return (await self.tell("trainer", f"steps/{batch.step}/commit", message, m.Done)).changed

    async def manifest(self, batch: m.Batch, *, weights: bytes = b"", **changes: Any) -> tuple[Signed, bytes, str]:
        """A sealed manifest with one shard, the shard and its digest."""
        data = weights or f"weights of step {batch.step}".encode()
        digest = digest_of(data)
        tensors = [m.Tensor(name="w", dtype="float32", shape=[1], digest=digest, shard=0)]
        latest = await self.ctx.database.read(self.ctx.run_ctx.latest)
        fields = {
            "run": RUN,
            "step": batch.step,
            "base_step": batch.step,
            "parent": latest.manifest,
            "digest": target_digest(tensors),
            "tensors": tensors,
            "shards": [m.Shard(digest=digest, size_bytes=len(data))],
            "secret_commitment": batch.secret_commitment,
            "made_at": self.clock(),
            "expires_at": self.clock() + 1000,
        }
        return seal(named("trainer"), "manifest", m.Manifest(**fields | changes)), data, digest

    async def step(self, step: int) -> m.Batch:
        """Claim and commit a step that must be ready."""
        batch = await self.claim_step(step)
        assert batch is not None, f"step {step} is not ready"
        await self.commit(batch)
        return batch

    async def make_trusted(self, name: str) -> None:
        """Bring a node through probation."""
        await self.client(name)
        while self.row(NODES, named(name).id).status == "probation":
            await self.work(name)
            await self.audit()
            await self.score()

    # --- looking -------------------------------------------------------------------------------------------------

    async def swept(self, *, after_s: float = 0.0) -> None:
        """Let time pass, then do what the coordinator does four times a second."""
        self.clock.now += after_s
        await self.ctx.database.write(self.coordinator.sweeper.sweep_once)

    def rows(self, query: Any) -> Sequence[Any]:
        """Rows of a query."""
        with self.ctx.database.engine.connect() as connection:
            return connection.execute(query).all()

    def row(self, table: sa.Table, id: str) -> Any:
        """One row by its key."""
        (create_run,) = self.rows(sa.select(table).where(next(iter(table.primary_key)) == id))
        return create_run

    def statuses(self, table: sa.Table, **where: Any) -> Counter[str]:
        """How many rows are in which status."""
        query = sa.select(table.c.status).where(*(table.c[name] == value for name, value in where.items()))
        return Counter(row[0] for row in self.rows(query))

    def balance(self, account: str) -> int:
        """Tokens in an account."""
        with self.ctx.database.engine.connect() as connection:
            return ledger.balance(connection, account)

    def story(self, id: str) -> list[str]:
        """The statuses that an id has gone through."""
        return [row.after for row in self.rows(sa.select(EVENTS).where(EVENTS.c.subject == id).order_by(EVENTS.c.id))]

    # --- what must hold whatever happened ------------------------------------------------------------------------

    def check(self) -> None:
        """Every status has its events, nothing is owned twice or paid twice, and the ledger sums to zero."""
        self._check_stories()
        self._check_owners()
        self._check_groups()
        self._check_ledger()
        self._check_kept()

    def _check_stories(self) -> None:
        told: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
        for row in self.rows(sa.select(EVENTS).order_by(EVENTS.c.id)):
            told[row.noun, row.subject].append((row.before, row.after))
        for noun, table in TABLE_OF.items():
            for id, status in self.rows(sa.select(next(iter(table.primary_key)), table.c.status)):
                story = told[noun, id]
                assert story, f"{noun} {id} has no events"
                assert story[0] == ("", states.first(noun)), (noun, id, story)
                assert story[-1][1] == status, (noun, id, status, story)
                assert all(one[1] == next_one[0] for one, next_one in pairwise(story)), (noun, id, story)
                for before, after in story[1:]:
                    is_fault = (noun, before, after) == ("rollout", "received", "received")
                    is_fault |= noun in ("node", "run") and before == after  # a warning
                    assert is_fault or states.is_legal(noun, before, after), (noun, id, story)

    def _check_owners(self) -> None:
        live = self.rows(sa.select(ROLLOUTS.c.group, ROLLOUTS.c.sample).where(ROLLOUTS.c.status.in_(LIVE_ROLLOUT)))
        assert max(Counter(tuple(row) for row in live).values(), default=1) == 1, "a sample has two live rollouts"
        holders = self.rows(sa.select(LEASES.c.node, LEASES.c.device).where(LEASES.c.status == "open"))
        assert max(Counter(map(tuple, holders)).values(), default=1) == 1, "a device has two open leases"
        leased = self.rows(
            sa.select(ROLLOUTS.c.rollout, LEASES.c.status)
            .join(LEASES, LEASES.c.lease == ROLLOUTS.c.lease)
            .where(ROLLOUTS.c.status == "leased")
        )
        assert {row.status for row in leased} <= {"open"}, "a rollout is leased without an open lease"

    def _check_groups(self) -> None:
        held = defaultdict(Counter)
        for row in self.rows(sa.select(ROLLOUTS.c.group, ROLLOUTS.c.status)):
            held[row.group][row.status] += 1
        open_groups = self.statuses(GROUPS, purpose="train")["open"]
        assert sum(row.open_groups for row in self.rows(sa.select(STEPS.c.open_groups))) == open_groups
        for group in self.rows(sa.select(GROUPS)):
            owned = sum(count for status, count in held[group.group].items() if status in LIVE_ROLLOUT)
            assert group.free == group.samples - owned, (group, held[group.group])
            whole = {"complete": "accepted", "batched": "batched", "trained": "trained"}.get(group.status)
            if whole:
                assert held[group.group][whole] == group.samples, (group, held[group.group])
            if group.status == "dropped":
                assert not set(held[group.group]) & {"leased", "held", "received", "accepted"}, held[group.group]
        trained = [row.subject for row in self.rows(sa.select(EVENTS).where(EVENTS.c.after == "trained"))]
        assert len(trained) == len(set(trained)), "something was trained on twice"

    def _check_kept(self) -> None:
        """What is kept count of is what the rows add up to."""
        with self.ctx.database.engine.connect() as connection:
            assert list(counts.differences(connection)) == []
        events = self.rows(sa.select(EVENTS.c.id, EVENTS.c.subject, EVENTS.c.after).where(EVENTS.c.noun == "lease"))
        opened = {row.subject: row.id for row in events if row.after == "open"}
        ended = {row.subject: row.id for row in events if row.after in ("expired", "returned")}
        again: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        rollouts = self.rows(sa.select(ROLLOUTS))
        for row in rollouts:
            again[row.group, row.sample] += [opened[row.lease]] if row.is_reissue else []
        left = {r.lease for r in rollouts if any(at > ended.get(r.lease, math.inf) for at in again[r.group, r.sample])}
        assert {row[0] for row in self.rows(sa.select(LEASES.c.lease).where(LEASES.c.is_reissued))} == left

    def _check_ledger(self) -> None:
        entries = self.rows(sa.select(ENTRIES))
        assert sum(row.tokens for row in entries) == 0
        balances: Counter[str] = Counter()
        paid: Counter[str] = Counter()
        for row in sorted(entries, key=lambda row: row.id):
            balances[row.account] += row.tokens
            if row.account.startswith("escrow:") and row.tokens > 0:
                paid[row.cause] += row.tokens
        for account, tokens in balances.items():
            assert tokens >= 0 or account == ledger.ISSUED, (account, tokens)
        tokens = {row.rollout: row.tokens for row in self.rows(sa.select(ROLLOUTS.c.rollout, ROLLOUTS.c.tokens))}
        assert all(amount == tokens[rollout] for rollout, amount in paid.items()), "paid twice, or not what it is worth"
        per_node = sa.select(ROLLOUTS.c.node, sa.func.sum(ROLLOUTS.c.tokens)).group_by(ROLLOUTS.c.node)
        in_escrow = per_node.where(ROLLOUTS.c.escrow_step.is_not(None))
        owed = {ledger.escrow(row[0]): row[1] for row in self.rows(in_escrow)}
        assert owed == {name: held for name, held in balances.items() if held and name.startswith("escrow:")}
