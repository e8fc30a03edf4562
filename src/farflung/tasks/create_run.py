"""Coordinator: create a run. Take the tasks from the environment, turn prompts into ids, seal the descriptor.

Done once; started again, the coordinator finds the run in its database and goes on.
"""

import asyncio
import hashlib
import json
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.config import SAVED, Config, Role
from farflung.envs import length
from farflung.envs.base import Split
from farflung.envs.child import ScorerChild
from farflung.learner.difficulty import Count, add
from farflung.protocol import wire
from farflung.protocol.errors import ConfigError
from farflung.protocol.identity import Key, seal
from farflung.protocol.messages import VERSION, AdmittedProfile, File, Run, RunInfo
from farflung.protocol.numerics import COARSER, NOISE
from farflung.protocol.stops import STOPS, Stops
from farflung.store.blobs import Blobs
from farflung.store.db import Database
from farflung.store.run import RunContext, train_tasks
from farflung.store.tables import RUNS, STEPS, TASKS
from farflung.store.transitions import move, record
from farflung.tasks import task_filter
from farflung.tasks.keyring import Keyring
from farflung.tasks.model import Model
from farflung.tasks.model_check import refuse_long, refuse_unfit
from farflung.tasks.stop_table import stops_of
from farflung.trust.evidence import ALPHA, WEIGHTS_OF, Profile, Profiles, to_json
from farflung.trust.profiles import load_profiles

MODEL_FILES = ("config.json", "generation_config.json")
MOST_PROMPT_TOKENS = 131_072
MOST_COARSER = 200_000
"""Audited tokens within which an admitted profile must tell weights of fewer bits than it says."""


def refuse_misfit(config: Config, profile: Profile) -> None:
    """Raise ConfigError for a numerics profile that bounds nothing in this run."""
    if why := misfit(config, profile):
        raise ConfigError(
            f"numerics profile {profile.name!r} was calibrated for {why}; on a machine that you trust run `farflung "
            f"calibrate {config.model.path} --device {profile.device} --arithmetic {profile.arithmetic} "
            "--prompts RUN.toml --out FILE.json` and name the file in model.profile or model.profiles"
        )


def refuse_blind(profile: Profile) -> None:
    """Raise ConfigError for a profile of quantised weights that hardly tells those of fewer bits."""
    for kind in COARSER[profile.quantiser] if profile.quantiser else ():
        nats = profile.power.get(WEIGHTS_OF + kind, 0.0)
        if nats * MOST_COARSER < math.log(1 / ALPHA):
            raise ConfigError(
                f"numerics profile {profile.name!r} does not tell weights of {kind} from its own {profile.quantiser} "
                f"within {MOST_COARSER:,} tokens ({nats:.1e} nats a token); calibrate it on this run's prompts and on "
                "more tokens, or leave it out of model.profiles"
            )


def misfit(config: Config, profile: Profile) -> str:
    """In words, the scope that a numerics profile was calibrated for instead of this run, or nothing."""
    if profile.scope is None:
        return "it does not say what"
    digest = Model(config.model.path).digest
    return profile.scope.refuses(digest, config.generate.temperature, config.generate.max_new_tokens)


def local_grants(config: Config) -> Config:
    """The configuration with keys in the run's own folder as trainer, scorer and validators, made where missing.

    A run whose trusted roles are elsewhere names their public keys in coordinator.grants, and nothing is made here.
    """
    if config.coordinator.grants:
        return config
    keys = config.folder / "keys"
    keys.mkdir(parents=True, exist_ok=True)
    names: dict[str, Role] = {"trainer": "trainer", "scorer": "scorer"}
    names |= {f"validator-{number + 1}": "validator" for number in range(config.swarm.validators)}
    grants = {Key.load_or_make(keys / name).public.hex(): role for name, role in names.items()}
    coordinator = config.coordinator.model_copy(update={"grants": grants})
    return config.model_copy(update={"coordinator": coordinator})


async def create_run(
    config: Config,
    database: Database,
    model: Model,
    key: Key,
    now: float,
    *,
    receipts: Key | None = None,
    verdicts: Key | None = None,
) -> RunContext:
    """The run of this configuration, made if it is not in the database yet. `key` signs what no other key is for."""
    stops = await asyncio.to_thread(stops_of, model, config.generate.stop)
    row = await database.read(lambda c: c.execute(sa.select(RUNS).where(RUNS.c.run == config.run.name)).first())
    if row is None:
        refuse_unfit(model)
        rows = await _tasks(config, model)
        secret = await database.write(lambda c: _write(c, config, rows, now))
    else:
        secret = row.secret
        await database.write(lambda c: _resume(c, config, now))
    tasks = await database.read(lambda c: train_tasks(c, config.run.name))
    quantised = frozenset(one.name for one in load_profiles(config.model).every if one.quantiser)
    return RunContext(
        config.run.name,
        config,
        secret,
        key,
        model.vocab,
        model.eos_ids,
        tasks,
        receipts or key,
        verdicts or key,
        stops,
        quantised,
    )


async def seal_descriptor(
    config: Config,
    blobs: Blobs,
    model: Model,
    key: Key,
    ring: Keyring,
    profiles: Profiles,
    stops: Stops | None = None,
    longest_prompt: int = 0,
) -> Run:
    """The documents that nodes check before they join: the root's delegations and the sealed description of the run."""
    files = {name: model.file(name) for name in MODEL_FILES} | {STOPS: stops.pack() if stops else None}
    run = config.run.name
    info = RunInfo(
        run=run,
        coordinator=key.id,
        status="running",
        version=VERSION,
        profile=profiles.run.name,
        profiles={one.name: admitted(one) for one in profiles.every},
        dtype=profiles.dtype,
        vocab=model.vocab,
        eos_ids=sorted(model.eos_ids),
        model_files=[await _store(blobs, name, data) for name, data in files.items() if data is not None],
        max_staleness=config.learn.max_staleness,
        heartbeat_s=config.lease.heartbeat_s,
        noise=NOISE,
        longest_prompt=longest_prompt,
        max_new_tokens=config.generate.max_new_tokens,
    )
    return Run(root=ring.root, delegations=ring.live_signed(time.time()), info=seal(key, "run", info))


def admitted(profile: Profile) -> AdmittedProfile:
    """A profile as the run's descriptor names it."""
    return AdmittedProfile(**profile.fields, digest=hashlib.sha256(to_json(profile)).hexdigest())


def weights_key(config: Config) -> bytes:
    """The public key of the run's trainer."""
    trainers = [public for public, role in config.coordinator.grants.items() if role == "trainer"]
    if len(trainers) != 1:
        raise ConfigError(
            f"coordinator.grants has {len(trainers)} trainers, one is needed; "
            'write grants = { "PUBLIC KEY IN HEX" = "trainer" }'
        )
    return bytes.fromhex(trainers[0])


async def _store(blobs: Blobs, name: str, data: bytes) -> File:
    return File(name=name, digest=await blobs.put(data), size_bytes=len(data))


def _secret(config: Config) -> bytes:
    if config.run.reproducible:
        return hashlib.sha256(f"farflung reproducible run {config.run.seed}".encode()).digest()
    return secrets.token_bytes(32)


async def _tasks(config: Config, model: Model) -> list[dict[str, Any]]:
    """Rows of both splits, every prompt as token ids."""
    env = config.env
    options = {"python": env.python} if env.python else {}
    async with ScorerChild(env.name, env.args, **options) as child:
        train, held_out = await child.tasks("train", env.train_tasks), await child.tasks("eval", env.eval_tasks)
    only = task_filter.read(env.keep) if env.keep else {}
    if env.keep:
        train = [(task, prompt) for task, prompt in train if task_filter.identity(task) in only]
    rows = [*_rows(config, "train", train, model, only), *_rows(config, "eval", held_out, model, {})]
    refuse_long(model, (len(wire.unpack_ids(row["prompt_ids"])) for row in rows), config.generate.max_new_tokens)
    count = sum(row["split"] == "train" for row in rows)
    need = config.lockstep_groups(0) if config.learn.lockstep else config.learn.groups
    if count < need:
        raise ConfigError(
            f"environment {env.name!r} has {count} training tasks{_of(env.keep)}; a step needs {need}, each once, "
            f"so give it more, or lower learn.groups = {config.learn.groups}"
            + (" or learn.max_staleness" if config.learn.lockstep else "")
        )
    return rows


def _of(keep: str) -> str:
    return f" that are in {keep}" if keep else ""


def with_length(config: Config, task: Any, prompt: Any) -> tuple[Any, int]:
    """A task's prompt with the length that it is to have, and that length; 0 for none."""
    env = config.env
    target = length.target_of(task_filter.payload(task), config.run.seed, env.lengths)
    return length.tell(prompt, target, env.length_prompt), target


def _rows(
    config: Config,
    split: Split,
    tasks: Sequence[tuple[Any, Any]],
    model: Model,
    known: Mapping[str, task_filter.FilteredTask],
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    run = config.run.name
    for position, (task, asked) in enumerate(tasks):
        payload, (prompt, target) = task_filter.payload(task), with_length(config, task, asked)
        identity = hashlib.sha256(f"{run}/{split}/".encode() + payload).hexdigest()
        ids = model.prompt_ids(prompt)
        if not 1 <= len(ids) <= MOST_PROMPT_TOKENS:
            raise ConfigError(
                f"task {payload[:80]!r} has a prompt of {len(ids)} tokens; 1 to {MOST_PROMPT_TOKENS} work"
            )
        shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        rows.append(
            {
                "task": "t" + identity[:16],
                "run": run,
                "split": split,
                "position": position,
                "payload": payload,
                "prompt": shown,
                "prompt_ids": wire.pack_ids(ids),
                "target": target,
                **_known(known.get(task_filter.identity(task))),
            }
        )
    return rows


def _known(before: task_filter.FilteredTask | None) -> dict[str, float]:
    """A task's difficulty as the task filter found it."""
    count = add(Count(), before.tried, before.right, before.tokens) if before else Count()
    return asdict(count)


def _write(connection: Connection, config: Config, tasks: list[dict[str, Any]], now: float) -> bytes:
    """Write the run down, unless another coordinator did meanwhile; gives its secret."""
    run = config.run.name
    if (earlier := connection.execute(sa.select(RUNS.c.secret).where(RUNS.c.run == run)).scalar()) is not None:
        return earlier
    secret = _secret(config)
    connection.execute(
        RUNS.insert().values(
            run=run,
            status="running",
            config=config.model_dump_json(),
            secret=secret,
            created_at=now,
            noise=NOISE,
        )
    )
    connection.execute(TASKS.insert(), tasks)
    record(connection, "run", [run], "", "running", now, tasks=len(tasks))
    if config.env.eval_tasks and all(task["split"] != "eval" for task in tasks):
        warning = f"no task of {config.env.name} is held out, so there will be no held-out score; give it more tasks"
        record(connection, "run", [run], "running", "running", now, warning=warning)
    return secret


def refuse_another(founded: dict[str, Any], config: Config) -> None:
    """Raise ConfigError for a run that goes on with another environment or model than it was founded with.

    A folder that was moved is the same one: of paths the last part counts.
    """
    asked = config.model_dump(mode="json")
    for section, key in (("env", "name"), ("env", "args"), ("model", "path"), ("generate", "stop")):
        before, after = founded.get(section, {}).get(key), asked[section][key]
        if before is not None and _last_part(before) != _last_part(after):
            raise ConfigError(
                f"run {config.run.name!r} was founded with {section}.{key} = {before!r} and cannot go on with "
                f"{after!r}; set it back, or begin a run of another name"
            )


def founded_in(folder: Path) -> dict[str, Any]:
    """The configuration that a run's folder holds, or nothing of one that cannot be read."""
    try:
        return json.loads((folder / SAVED).read_bytes())
    except (OSError, ValueError):
        return {}


def _last_part(value: Any) -> Any:
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else value


def _resume(connection: Connection, config: Config, now: float) -> None:
    """A run that is given more steps goes on, also one that was about to end; one with fewer than it has done ends."""
    run = config.run.name
    founded, status, noise = connection.execute(
        sa.select(RUNS.c.config, RUNS.c.status, RUNS.c.noise).where(RUNS.c.run == run)
    ).one()
    if noise != NOISE:
        raise ConfigError(
            f"run {run!r} samples with the noise {noise!r}, this version of farflung with {NOISE!r}, by which honest "
            "work of before would look forged; end it with the version that began it, or begin a new run from its "
            "weights: `farflung export`, then name that folder in model.path"
        )
    refuse_another(json.loads(founded), config)
    done = connection.execute(
        sa.select(sa.func.max(STEPS.c.step)).where(STEPS.c.run == run, STEPS.c.status == "committed")
    ).scalar()
    is_done = (-1 if done is None else done) >= config.run.steps
    if status == "running" and is_done:
        move(connection, "run", [run], "running", "finishing", now, steps=config.run.steps)
    if status == "finishing" and not is_done:
        move(connection, "run", [run], "finishing", "finished", now)
    if status in ("finishing", "finished") and not is_done:
        move(connection, "run", [run], "finished", "running", now, steps=config.run.steps)
