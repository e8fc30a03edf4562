"""The command line. Each command is a few lines: read the configuration, start the role, say what went wrong."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from cyclopts import App, Parameter

from farflung.config import Config, RelaySection, WorkerSection, load
from farflung.engine.heap import keep_freed_memory
from farflung.ops.logs import start_logging
from farflung.protocol.errors import ConfigError, FarflungError

app = App(name="farflung", help="Reinforcement learning on far-flung machines that nobody has to trust.")

HOME = Path.home() / ".farflung"
Flags = Annotated[str, Parameter(allow_leading_hyphen=True, help="Settings as --section.key value.")]


def main() -> None:
    """Run one command; whatever the user can mend is one sentence and exit code 2."""
    # Read once, as torch is imported: a thread that waits for another soon gives its core to the roles beside it.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except FarflungError as error:
        sys.exit(_complain(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(error: FarflungError) -> int:
    sys.stderr.write(f"farflung: {error}\n")
    return 2


@app.command
def run(config: Path, *flags: Flags, resume: bool = False, fresh: bool = False, plain: bool = False) -> None:
    """Run a whole experiment on this machine: coordinator, trainer, validators, scorers and workers.

    Parameters
    ----------
    config
        A TOML file, such as examples/demo.toml.
    resume
        Go on with the run in its folder.
    fresh
        Throw away an older run of the same name.
    plain
        Print lines instead of the live view, as it does anyway where there is no terminal.
    """
    from farflung.ops.swarm import Swarm, prepare

    settings = _settings(config, flags)
    prepare(settings, resume=resume, fresh=fresh)
    sys.exit(asyncio.run(Swarm(settings, is_plain=plain or not sys.stdout.isatty()).run()))


@app.command
def export(run: Path, out: Path, step: int | None = None) -> None:
    """Write a run's policy as a plain Hugging Face folder with a model card.

    Parameters
    ----------
    run
        Folder of the run, such as runs/demo.
    out
        Folder to write; it must not exist.
    step
        A step whose checkpoint is kept; the newest by default.
    """
    from farflung.ops import export as exporting

    sys.stdout.write(f"{out}: the policy of step {exporting.export(run, out, step)}\n")


@app.command
def coordinator(config: Path, *flags: Flags, json: bool = False) -> None:
    """Admit nodes, hand out leases, take rollouts in, keep records and ledger."""
    from farflung.ops.fleet import serve_all

    start_logging(json)
    serve_all(_settings(config, flags))


@app.command
def trainer(config: Path, *flags: Flags, url: str = "", json: bool = False) -> None:
    """Claim batches, take steps, publish weights; started by torchrun, over all of its processes."""
    from farflung.learner.ranks import join as meet
    from farflung.protocol.identity import Key
    from farflung.trainer import Trainer, follow

    _start_computing(json)
    settings = _settings(config, flags)
    ranks = meet()
    if ranks.rank:
        follow(settings, ranks)
        return
    key = Key.load_or_make(settings.folder / "keys" / "trainer")
    asyncio.run(Trainer(_url(url, settings), key, settings, root=_root(settings), ranks=ranks).run())


@app.command
def validator(config: Path, *flags: Flags, url: str = "", name: str = "validator-1", json: bool = False) -> None:
    """Replay drawn rollouts and sign what was seen."""
    from farflung.protocol.identity import Key
    from farflung.validator import Validator

    _start_computing(json)
    settings = _settings(config, flags)
    key = Key.load_or_make(settings.folder / "keys" / name)
    folder = settings.folder / "nodes" / name
    asyncio.run(
        Validator(
            _url(url, settings), key, folder, settings.validator, run=settings.run.name, root=_root(settings), name=name
        ).run()
    )


@app.command
def scorer(config: Path, *flags: Flags, url: str = "", name: str = "scorer", json: bool = False) -> None:
    """Judge transcripts in child processes."""
    from farflung.protocol.identity import Key
    from farflung.scorer import Scorer

    start_logging(json)
    settings = _settings(config, flags)
    key = Key.load_or_make(settings.folder / "keys" / name)
    asyncio.run(Scorer(_url(url, settings), key, settings, root=_root(settings), name=name).run())


@app.command
def worker(
    url: str,
    *,
    folder: Path = Path("farflung-worker"),
    name: str = "",
    run: str = "",
    root: str = "",
    slots: int = 64,
    threads: int = 1,
    engine: Literal["local", "vllm"] = "local",
    engine_url: str = WorkerSection().engine_url,
    profile: str = "",
    patience_s: float = 60.0,
    relay_port: int = 0,
    relay_url: str = "",
    metrics_port: int = 0,
    json: bool = False,
) -> None:
    """Generate rollouts for a coordinator.

    Parameters
    ----------
    url
        The coordinator's address.
    folder
        Where this node keeps its key and the weights it fetched.
    name
        What people see.
    run
        Which run to work for, if there are several.
    root
        Public root key in hex that must vouch for the run; empty to believe the first one met.
    slots
        Rollouts generated at once.
    threads
        Torch threads.
    engine
        What generates: this process, or a vLLM server.
    engine_url
        Where the vLLM server is; it must read this node's files.
    profile
        Numerics profile to be judged by, one that the run admits; empty for the run's own.
    patience_s
        How long to wait for a coordinator that does not answer.
    relay_port
        Open port to be a relay at as well, on all addresses; 0 to be none.
    relay_url
        Where nodes reach that relay, such as http://worker.example:7000.
    metrics_port
        Port on 127.0.0.1 for Prometheus; 0 for none.
    json
        Log as JSON.
    """
    from farflung.protocol.identity import Key
    from farflung.worker import Worker

    _start_computing(json)
    folder.mkdir(parents=True, exist_ok=True)
    key = Key.load_or_make(folder / "key")
    pinned = bytes.fromhex(root) if root else None
    settings = WorkerSection(
        slots=slots,
        threads=threads,
        engine=engine,
        engine_url=engine_url,
        profile=profile,
        metrics_port=metrics_port,
    )
    options: Any = {"run": run, "root": pinned, "name": name}
    with contextlib.ExitStack() as stack:
        if relay_port:
            from farflung.ops.beside import relay_beside

            if not relay_url:
                raise ConfigError("--relay-port needs --relay-url, where nodes reach it: http://this-machine:port")
            own = RelaySection(host="0.0.0.0", port=relay_port, public_url=relay_url)
            address = stack.enter_context(relay_beside(url, folder, own, **options))
            settings = settings.model_copy(update={"upstream": (address,)})
        asyncio.run(Worker(url, key, folder, settings, patience_s=patience_s, **options).run())


@app.command
def join(
    address: str,
    *,
    folder: Path = HOME,
    name: str = "",
    run: str = "",
    invite: str = "",
    slots: int = 64,
    threads: int = 1,
    engine: Literal["local", "vllm"] = "local",
    engine_url: str = WorkerSection().engine_url,
    profile: str = "",
    disk_gb: float = 0.0,
    memory_gb: float = 0.0,
    context: int = 0,
    unchecked: bool = False,
    metrics_port: int = 0,
    json: bool = False,
) -> None:
    """Join a run with this machine: make a key, check everything, work, and tell what was earned.

    Parameters
    ----------
    address
        As the operator gives it: https://host:port#root, where root is the public root key of the run in hex.
    folder
        Where this node keeps its key and the weights it fetches.
    name
        What people see; without it, a name made from the key.
    run
        Which run to work for, if there are several.
    invite
        Token, for runs that admit invited nodes only.
    slots
        Rollouts generated at once.
    threads
        Torch threads.
    engine
        What generates: this process, or a vLLM server.
    engine_url
        Where the vLLM server is; it must read this node's files.
    profile
        Numerics profile to be judged by, one that the run admits; empty for the run's own.
    disk_gb
        Most disk for weights; 0 for no bound but what is free.
    memory_gb
        Most memory for the model; 0 for half of the machine's.
    context
        Longest prompt and completion taken, in tokens; 0 for no limit.
    unchecked
        Join even if checks fail.
    metrics_port
        Port on 127.0.0.1 for Prometheus; 0 for none.
    json
        Log as JSON.
    """
    from farflung.ops.join import join as join_run

    _start_computing(json)
    settings = WorkerSection(
        slots=slots,
        threads=threads,
        engine=engine,
        engine_url=engine_url,
        profile=profile,
        disk_gb=disk_gb,
        memory_gb=memory_gb,
        context=context,
        metrics_port=metrics_port,
    )
    asyncio.run(join_run(address, folder, settings, name=name, run=run, invite=invite, is_checked=not unchecked))


@app.command
def doctor(address: str = "", *, folder: Path = HOME) -> None:
    """Check this machine, and the way to a run, for whatever could keep it from taking part.

    Parameters
    ----------
    address
        Address of a run; empty to check this machine alone.
    folder
        Where the node keeps its key and weights.
    """
    from farflung.ops.doctor import doctor as examine
    from farflung.ops.join import parse

    url, root = parse(address) if address else ("", None)
    sys.exit(0 if asyncio.run(examine(url, folder, root)) else 1)


@app.command
def relay(
    url: str,
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
    json: bool = False,
) -> None:
    """Mirror a run's weights and serve them to nodes.

    Parameters
    ----------
    url
        The coordinator's address.
    folder
        Where this relay keeps its key and what it mirrors.
    name
        What people see.
    run
        Which run to mirror, if there are several.
    root
        Public root key in hex that must vouch for the run; empty to believe the first one met.
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
    json
        Log as JSON.
    """
    from farflung.protocol.identity import Key
    from farflung.relay import Relay

    start_logging(json)
    folder.mkdir(parents=True, exist_ok=True)
    key = Key.load_or_make(folder / "key")
    settings = RelaySection(host=host, port=port, public_url=public_url, upstream=_list(upstream), disk_gb=disk_gb)
    pinned = bytes.fromhex(root) if root else None
    asyncio.run(Relay(url, key, folder, settings, run=run, root=pinned, name=name).run())


@app.command
def status(url: str, *, run: str = "") -> None:
    """Show a run at a glance.

    Parameters
    ----------
    url
        The coordinator's address.
    run
        Which run, if the coordinator has several.
    """
    from farflung.ops.look import show_status

    asyncio.run(show_status(url, run))


@app.command
def weights(url: str, *, run: str = "") -> None:
    """List the versions of a run's weights: bytes whole and as a difference, who has them, how old they are.

    Parameters
    ----------
    url
        The coordinator's address.
    run
        Which run, if the coordinator has several.
    """
    from farflung.ops.look import show_weights

    asyncio.run(show_weights(url, run))


@app.command
def story(id: str, *, url: str) -> None:
    """Tell everything that happened to one id: a node, lease, rollout, group, step or audit.

    Parameters
    ----------
    id
        The id, as the dashboard, the logs or another story show it.
    url
        The coordinator's address.
    """
    from farflung.ops.look import tell_story

    asyncio.run(tell_story(url, id))


@app.command
def view(folder: Path, *, host: str = "127.0.0.1", port: int = 0) -> None:
    """Open the dashboard over a run that is over, read only.

    Parameters
    ----------
    folder
        The run's folder, such as runs/demo.
    host
        Address to listen on.
    port
        Port to listen on; 0 for any free one.
    """
    from farflung.ops.view import view as serve_view

    serve_view(folder, host, port)


@app.command
def report(folder: Path) -> None:
    """Write a run's report.html again, from its database and metrics.jsonl.

    Parameters
    ----------
    folder
        The run's folder, such as runs/demo.
    """
    from farflung.ops.report import write_report
    from farflung.ops.summary import summarise

    sys.stdout.write(f"{asyncio.run(write_report(folder, summarise(folder)))}\n")


@app.command
def summary(folder: Path) -> None:
    """Recompute a run's summary.json from its database and metrics.jsonl, and print it.

    Parameters
    ----------
    folder
        The run's folder, such as runs/demo.
    """
    import json as json_module

    from farflung.ops.summary import summarise

    sys.stdout.write(json_module.dumps(summarise(folder), indent=2) + "\n")


@app.command
def backup(config: Path, *flags: Flags, to: Path) -> None:
    """Copy a run while it goes: keys, checkpoints, database, blobs, so that `farflung restore` can go on from there.

    Parameters
    ----------
    config
        The run's TOML file, or the config.json in its folder.
    to
        A folder that is not there yet.
    """
    from farflung.ops.backup import back_up

    _end_with(back_up(_settings(config, flags), to))


@app.command
def restore(backup: Path, *, to: Path) -> None:
    """Make a run's folder from a backup, and check that everything in it holds together.

    Parameters
    ----------
    backup
        What `farflung backup` made.
    to
        The folder of runs, such as runs; the run gets its own there, which must not exist.
    """
    from farflung.ops.backup import restore as bring_back

    _end_with(bring_back(backup, to))


@app.command
def key(path: Path) -> None:
    """Show the key in a file, made if there is none: what an operator needs to grant it a role or to admit it.

    Parameters
    ----------
    path
        The key file.
    """
    from farflung.protocol.identity import Key, readable_name

    found = Key.load_or_make(path)
    sys.stdout.write(f"{readable_name(found.id)}\nnode   {found.id}\npublic {found.public.hex()}\n")


@app.command
def keys(
    action: Literal["show", "rotate"],
    config: Path,
    *flags: Flags,
    purpose: str = "",
    root: Path | None = None,
    days: float = 365.0,
    public: str = "",
    revoke: bool = False,
) -> None:
    """Show which keys speak for a run, or have the root delegate another one in place of one that is old or lost.

    Parameters
    ----------
    action
        `show` prints the root's delegations, `rotate` adds one.
    config
        The run's TOML file, or the config.json in its folder.
    purpose
        What the key is for: coordinator, weights, receipts or verdicts.
    root
        File of the root's private key; without it, keys/root in the run's folder.
    days
        How long the delegation lasts.
    public
        Public key in hex to delegate to; without it a fresh one is made in the run's folder.
    revoke
        Refuse the keys that had this purpose before from now on; without it they are good until they expire.
    """
    from farflung.ops import keys as ops_keys

    settings = _settings(config, flags)
    if action == "show":
        ops_keys.show(settings)
    else:
        ops_keys.rotate(settings, purpose, root, days, revoke=revoke, public=public)


@app.command
def calibrate(
    model: str,
    *,
    profile: str = "torch-cpu-fp32",
    out: Path,
    prompts: Path | None = None,
    tokens: int = 80_000,
    threads: int = 1,
    engine_url: str = "",
) -> None:
    """Measure how honest nodes of a numerics profile differ from a validator, and write the profile.

    Parameters
    ----------
    model
        Folder of a Hugging Face causal LM.
    profile
        Name of the profile; it names the arithmetic.
    out
        JSON file to write.
    prompts
        Text file with one prompt a line, or the TOML file of a run, whose environment gives them; without it, the
        demo's sums.
    tokens
        Tokens generated in large batches; small batches add a third of that.
    threads
        Torch threads.
    engine_url
        A vLLM server that generates, whose arithmetic the profile then is; empty for this process.
    """
    from farflung.ops.calibrate import write_profile

    start_logging()
    write_profile(model, profile, out, prompts, tokens=tokens, threads=threads, engine_url=engine_url)


@app.command
def sift(config: Path, *flags: Flags, out: Path, samples: int = 8, low: float = 0.1, high: float = 0.9) -> None:
    """Sample the base model on a run's training tasks, and write those that it gets right neither never nor always.

    Parameters
    ----------
    config
        The TOML file of a run; env.train_tasks tasks of its environment are tried.
    out
        File to write, for env.keep of the same run.
    samples
        Answers to each task.
    low
        Smallest share of right answers that is kept.
    high
        Largest share that is kept.
    """
    from farflung.ops.sift import Band
    from farflung.ops.sift import sift as choose

    start_logging()
    chosen, tried = asyncio.run(choose(load(config, flags), out, Band(samples, low, high)))
    sys.stdout.write(f"kept {len(chosen)} of {tried} tasks, those with {low:.0%} to {high:.0%} of {samples} right; ")
    sys.stdout.write(f'train on them with env.keep = "{out}"\n')


@app.command
def redteam(config: Path, *flags: Flags, attacks: str = "", at_once: int = 7, times: int = 1) -> None:
    """Run the gallery of adversaries against runs of one's own, and print what came of each.

    Parameters
    ----------
    config
        A TOML file, such as examples/redteam.toml.
    attacks
        Names from the gallery with commas between them; empty for all.
    at_once
        Adversaries in one swarm; as many swarms follow one another as are needed.
    times
        How often each attack is run; the table then has medians.
    """
    from farflung.ops.redteam import GALLERY
    from farflung.ops.trial import run_trial, show

    names = attacks.split(",") if attacks else list(GALLERY)
    show(run_trial(_settings(config, flags), names, at_once, times))


@app.command
def chaos(config: Path, *flags: Flags, minutes: float = 30.0, json: bool = False) -> None:
    """Run a swarm on this machine, break every role of it on a seeded schedule, and say what each fault cost.

    Parameters
    ----------
    config
        A TOML file, such as examples/chaos.toml.
    minutes
        How long faults go on; the same run without faults comes first, for a quarter of that.
    json
        Print nothing but one line of JSON at the end.
    """
    import json as json_module

    from farflung.ops.chaos import run_chaos

    result = run_chaos(_settings(config, flags), minutes, is_quiet=json)
    sys.stdout.write(json_module.dumps(result) + "\n")
    sys.exit(1 if result["invariant_violations"] else 0)


@app.command
def brake(config: Path, *flags: Flags, release: bool = False, url: str = "") -> None:
    """Say whether verdicts and training are held because too many good nodes failed at once, or let them go on.

    Parameters
    ----------
    config
        The run's TOML file, or the config.json in its folder.
    release
        Let them go on, once validators and weights were looked at.
    url
        The coordinator's address; without it, as written in the run's folder.
    """
    from farflung.ops.operate import release_brake, show_brake

    settings = _settings(config, flags)
    tell = release_brake if release else show_brake
    asyncio.run(tell(_url(url, settings), settings))


@app.command
def rollback(config: Path, *flags: Flags, to_step: int, without: tuple[str, ...] = (), url: str = "") -> None:
    """Take up an earlier step again: the next step restores it, and goes on without the work of some nodes.

    Parameters
    ----------
    config
        The run's TOML file, or the config.json in its folder.
    to_step
        The last step to keep; `farflung story STEP` names who contributed to each.
    without
        Nodes to eject, whatever the evidence against them; may be given again and again.
    url
        The coordinator's address; without it, as written in the run's folder.
    """
    from farflung.ops.operate import roll_back

    settings = _settings(config, flags)
    asyncio.run(roll_back(_url(url, settings), settings, to_step, without))


def _end_with(main: Coroutine[Any, Any, str]) -> NoReturn:
    """Say what came of it and end at once: the blob store's threads may not outlive the interpreter (it aborts)."""
    try:
        sys.stdout.write(asyncio.run(main) + "\n")
        code = 0
    except FarflungError as error:
        code = _complain(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _start_computing(json: bool) -> None:
    """What the roles with a model begin with."""
    start_logging(json)
    keep_freed_memory()


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _settings(config: Path, flags: tuple[str, ...]) -> Config:
    """What is configured; this process and those that it starts trust the authority that is named there."""
    from farflung.protocol.client import CA_VARIABLE

    settings = load(config, flags)
    if settings.coordinator.tls_ca:
        os.environ[CA_VARIABLE] = str(Path(settings.coordinator.tls_ca).resolve())
    return settings


def _url(url: str, config: Config) -> str:
    """The coordinator's address: given, or as the coordinator of the same folder wrote it."""
    if url:
        return url
    path = config.folder / "coordinator.url"
    if not path.exists():
        raise ConfigError(f"{path} is missing: start the coordinator first, or say --url http://host:port")
    return path.read_text().strip()


def _root(config: Config) -> bytes | None:
    """The root key of a run whose folder is on this machine; elsewhere the first one met is believed."""
    from farflung.tasks.keyring import root_of

    return root_of(config.folder / "keys")


if __name__ == "__main__":
    main()
