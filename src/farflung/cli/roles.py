"""Commands that start one role of a run on this machine."""

import asyncio
import contextlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cyclopts import Parameter

from farflung.cli.app import (
    HOME,
    JOIN,
    ROLES,
    Address,
    Flags,
    Json,
    RunFile,
    Url,
    app,
    expanded,
    parts_of,
    settings_of,
    start_computing,
    url_of,
)
from farflung.cli.lending import UNSAID, Lending
from farflung.config import Config, RelaySection, WorkerSection
from farflung.launch import role_makers
from farflung.launch.logs import start_logging
from farflung.protocol.errors import ConfigError
from farflung.protocol.identity import Key
from farflung.protocol.numerics import EngineKind
from farflung.store import owner

ENGINE = Path(WorkerSection().engine_home)


@app.command(group=ROLES)
def coordinator(config: Path, *flags: Flags, json: Json = False) -> None:
    """Admit nodes, hand out leases, take rollouts in.

    Parameters
    ----------
    config
        The run's TOML file.
    """
    from farflung.launch.coordinators import serve_all

    start_logging(json)
    settings = settings_of(config, flags)
    _enter(settings)
    serve_all(settings)


@app.command(group=ROLES)
def trainer(config: RunFile, *flags: Flags, url: Url = "", json: Json = False) -> None:
    """Claim batches, take steps, publish weights.

    Started by torchrun it trains over all of its processes.
    """
    from farflung.learner.build import follow
    from farflung.learner.ranks import join as meet
    from farflung.learner.ranks import leave
    from farflung.rollouts.sharded_engine import Follower

    start_computing(json)
    settings = settings_of(config, flags)
    ranks = meet()
    if ranks.rank:
        follow(settings, ranks, Follower(settings.learn.device, ranks).execute)
    else:
        _enter(settings, "trainer")
        asyncio.run(role_makers.trainer(url_of(url, settings), settings, ranks).run())
    leave(ranks)


@app.command(group=ROLES)
def validator(config: RunFile, *flags: Flags, url: Url = "", name: str = "validator-1", json: Json = False) -> None:
    """Replay drawn rollouts, sign the evidence, evaluate.

    Parameters
    ----------
    name
        Picks the key, keys/NAME in the run's folder.
    """
    start_computing(json)
    settings = settings_of(config, flags)
    _enter(settings, name)
    asyncio.run(role_makers.validator(url_of(url, settings), settings, name).run())


@app.command(group=ROLES)
def scorer(config: RunFile, *flags: Flags, url: Url = "", name: str = "scorer", json: Json = False) -> None:
    """Judge transcripts in child processes.

    Parameters
    ----------
    name
        Picks the key, keys/NAME in the run's folder.
    """
    start_logging(json)
    settings = settings_of(config, flags)
    _enter(settings, name)
    asyncio.run(role_makers.scorer(url_of(url, settings), settings, name).run())


@Parameter(name="*")
@dataclass(frozen=True)
class Generating:
    """How a node generates: flags of every command that starts a worker.

    Parameters
    ----------
    slots
        Rollouts generated at once; 0 for as many as the device has room for.
    threads
        Torch threads.
    device
        What it computes on: auto for the best there is, cpu, cuda, cuda:N, mps or xpu; with vLLM, what the server
        does, where it does not say.
    processes
        Processes under one key, each on a device; 0 for one on each accelerator of the machine.
    engine
        The engine that generates: torch, MLX or llama.cpp in this process, or a vLLM server.
    engine_url
        Where a vLLM server is that runs, on this machine; empty where this node starts one.
    profile
        Numerics profile to compute in and be judged by, one that the run admits; empty for one that fits.
    ignore_self_test
        Work even if this machine's arithmetic is noisier than its profile allows.
    metrics_port
        Port on 127.0.0.1 for Prometheus; 0 for none.
    """

    slots: int = 0
    threads: int = 1
    device: str = "auto"
    processes: int = 0
    engine: EngineKind = "torch"
    engine_url: str = ""
    profile: str = ""
    ignore_self_test: bool = False
    metrics_port: int = 0


@app.command(group=ROLES)
def worker(
    url: Address,
    *,
    folder: Path = Path("farflung-worker"),
    name: str = "",
    run: str = "",
    root: str = "",
    how: Generating = Generating(),
    patience_s: float = 60.0,
    relay_port: int = 0,
    relay_url: str = "",
    json: Json = False,
) -> None:
    """Generate rollouts for a coordinator.

    Parameters
    ----------
    folder
        Where this node keeps its key and the weights it fetched.
    name
        Name that people see; without it, one made from the key.
    run
        Which run to work for, if there are several.
    root
        Public root key in hex that must vouch for the run; empty for trust on first use.
    how
        How it generates.
    patience_s
        How long to wait for a coordinator that does not answer.
    relay_port
        Open port to be a relay at as well, on all addresses; 0 to be none.
    relay_url
        Where nodes reach that relay, such as http://worker.example:7000.
    """
    start_computing(json)
    key = _key_in(folder)
    asyncio.run(_meet(url, key, patience_s))
    from farflung.ops.several import run_node

    pinned = bytes.fromhex(root) if root else None
    settings = WorkerSection(**asdict(how))
    options: Any = {"run": run, "root": pinned, "name": name}
    with contextlib.ExitStack() as stack:
        if relay_port:
            from farflung.ops.relay_beside import relay_beside

            if not relay_url:
                raise ConfigError("--relay-port needs --relay-url, where nodes reach it: http://this-machine:port")
            own = RelaySection(host="0.0.0.0", port=relay_port, public_url=relay_url)
            address = stack.enter_context(relay_beside(url, folder, own, **options))
            settings = settings.model_copy(update={"upstream": (address,)})
        asyncio.run(run_node(url, key, folder, settings, {"patience_s": patience_s} | options, is_json=json))


@app.command(group=JOIN)
def engine(action: Literal["install"], name: Literal["vllm"], *, folder: Path = ENGINE) -> None:
    """Install an engine that is not ours, in an environment of its own: `farflung engine install vllm`.

    Parameters
    ----------
    action
        What to do.
    name
        Which engine.
    folder
        Where it goes; `--engine vllm` starts it from there.
    """
    from farflung.ops.engine_install import install

    sys.stdout.write(install(expanded(folder)) + "\n")


def _enter(settings: Config, role: str = "") -> None:
    """Share the folder of a run with its other roles, and have one role of it alone. Raises ConfigError."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    owner.own(settings.folder, is_shared=True)
    if role:
        owner.own(settings.folder, role)


def _key_in(folder: Path) -> Key:
    """The key of a node whose folder this process alone works in. Raises ConfigError if another does."""
    folder.mkdir(parents=True, exist_ok=True)
    owner.own(folder)
    return Key.load_or_make(folder / "key")


async def _meet(url: str, key: Key, patience_s: float) -> None:
    """Meet the coordinator before torch is loaded, so that a wrong address is told at once."""
    from farflung.net.client import Client
    from farflung.net.session import greet

    client = Client(url, key, patience_s=patience_s)
    try:
        await greet(client)
    finally:
        await client.close()


@app.command(group=JOIN, sort_key=1)
def join(
    address: str,
    *,
    folder: Path = HOME,
    name: str = "",
    run: str = "",
    invite: str = "",
    how: Generating = Generating(),
    when: Lending = UNSAID,
    disk_gb: float = 0.0,
    memory_gb: float = 0.0,
    context: int = 0,
    unchecked: bool = False,
    json: Json = False,
) -> None:
    """Join a run with this machine.

    It makes a key, checks the machine, works, and tells at the end what was earned.

    Parameters
    ----------
    address
        As the operator gives it: https://host:port#root, where root is the public root key of the run in hex.
    folder
        Where this node keeps its key and the weights it fetches.
    name
        Name that people see; without it, one made from the key.
    run
        Which run to work for, if there are several.
    invite
        Token, for runs that admit invited nodes only.
    how
        How it generates.
    when
        When it works.
    disk_gb
        Most disk for weights; 0 for no bound but what is free.
    memory_gb
        Most memory of the device; 0 for half of a machine's, 0.9 of a card's that is free.
    context
        Longest prompt and completion taken, in tokens; 0 for no limit.
    unchecked
        Join even if checks fail.
    """
    folder, idle = expanded(folder), when.settings()
    _key_in(folder)
    from farflung.ops.join import join as join_run

    start_computing(json)
    settings = WorkerSection(**asdict(how), disk_gb=disk_gb, memory_gb=memory_gb, context=context)
    options = {"name": name, "run": run, "invite": invite, "is_json": json}
    asyncio.run(join_run(address, folder, settings, **options, idle=idle, is_checked=not unchecked))


@app.command(group=ROLES)
def relay(
    url: Address,
    *,
    folder: Path = Path("farflung-relay"),
    name: str = "",
    run: str = "",
    root: str = "",
    host: str = "127.0.0.1",
    port: int = 0,
    public_url: str = "",
    upstream: str = "",
    disk_gb: float = 0.0,
    json: Json = False,
) -> None:
    """Mirror a run's weights and serve them to nodes.

    Parameters
    ----------
    folder
        Where this relay keeps its key and the weights that it mirrors.
    name
        Name that people see; without it, one made from the key.
    run
        Which run to mirror, if there are several.
    root
        Public root key in hex that must vouch for the run; empty for trust on first use.
    host
        Address to listen on.
    port
        Port to listen on; 0 for any free one.
    public_url
        Where nodes reach it, such as http://relay.example:7000; empty for host and port.
    upstream
        Addresses of relays to mirror from, with commas between them; empty for the coordinator alone.
    disk_gb
        Most disk for weights; 0 for no bound but what is free.
    """
    from farflung.relay import Relay

    start_logging(json)
    key = _key_in(folder)
    settings = RelaySection(host=host, port=port, public_url=public_url, upstream=parts_of(upstream), disk_gb=disk_gb)
    pinned = bytes.fromhex(root) if root else None
    asyncio.run(Relay(url, key, folder, settings, run=run, root=pinned, name=name).run())
