"""Commands about keys, numerics and attacks, and what this machine can do."""

import asyncio
import sys
from pathlib import Path
from typing import Literal

from farflung.cli.app import BREAK, HOME, JOIN, RUN, SAFE, Flags, RunConfig, RunFolder, app, expanded, settings_of
from farflung.launch.logs import start_logging
from farflung.protocol.numerics import EngineKind


@app.command(group=SAFE)
def key(path: Path) -> None:
    """Show the key in a file, made if there is none.

    An operator needs its public half to grant it a role, its node id to admit it.

    Parameters
    ----------
    path
        The key file.
    """
    from farflung.protocol.identity import Key, readable_name

    found = Key.load_or_make(path)
    sys.stdout.write(f"{readable_name(found.id)}\nnode   {found.id}\npublic {found.public.hex()}\n")


@app.command(group=SAFE)
def keys(
    action: Literal["show", "rotate"],
    config: RunConfig,
    *flags: Flags,
    purpose: str = "",
    root: Path | None = None,
    days: float = 365.0,
    public: str = "",
    revoke: bool = False,
) -> None:
    """Show or rotate the keys that speak for a run.

    Rotating has the root key delegate another key in place of one that is old or lost.

    Parameters
    ----------
    action
        `show` prints the root's delegations, `rotate` adds one.
    purpose
        Purpose of the key: coordinator, weights, receipts or verdicts.
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

    settings = settings_of(config, flags)
    if action == "show":
        ops_keys.show(settings)
    else:
        ops_keys.rotate(settings, purpose, root, days, revoke=revoke, public=public)


@app.command(group=RUN)
def calibrate(
    model: str,
    *,
    profile: str = "",
    out: Path,
    prompts: Path | None = None,
    tokens: int = 80_000,
    temperature: float = 1.0,
    max_new_tokens: int = 32,
    threads: int = 1,
    device: str = "auto",
    arithmetic: Literal["", "float32", "bfloat16", "float16", "fp8"] = "",
    quantiser: Literal["", "int8", "fp8", "int4"] = "",
    engine: EngineKind = "torch",
    engine_url: str = "",
) -> None:
    """Measure numerical noise on this trusted machine, and write a numerics profile.

    The numerics profile says how far honest nodes may differ from a validator.

    Parameters
    ----------
    model
        Folder of a Hugging Face causal LM.
    profile
        Name of the profile; empty for one made of engine, device and arithmetic.
    out
        JSON file to write.
    prompts
        Text file with one prompt a line, or the TOML file of a run, which gives prompts, temperature and
        max_new_tokens; without it, the demo's sums.
    tokens
        Tokens generated in large batches; other ways to generate add two thirds of that.
    temperature
        Sampling temperature of the runs that use the profile.
    max_new_tokens
        Most tokens of a completion in these runs.
    threads
        Torch threads.
    device
        What verifiers, and the generator of this process, compute on: auto for the best there is, cpu, cuda:N, mps.
    arithmetic
        What nodes generate in; empty for float32 on a CPU and bfloat16 elsewhere, or what the vLLM server says.
    quantiser
        What nodes make of the published weights before they compute, and verifiers of theirs; empty for nothing.
    engine
        The engine that generates: torch, MLX or llama.cpp in this process, or a vLLM server.
    engine_url
        Where that server is; empty for one that is started for it.
    """
    from farflung.ops.calibrate import write_profile

    start_logging()
    write_profile(
        model,
        profile,
        out,
        prompts,
        tokens=tokens,
        threads=threads,
        device=device,
        arithmetic=arithmetic,
        quantiser=quantiser,
        engine="vllm" if engine_url else engine,
        engine_url=engine_url,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
    )


@app.command(group=RUN)
def recalibrate(folder: RunFolder, profile: str, *, out: Path, nodes: tuple[str, ...] = (), name: str = "") -> None:
    """Make a numerics profile anew from a run's audits.

    For machines whose arithmetic has changed, a renewed driver say: what they sent was replayed by your validators.
    A node that flips as the others do not is left out.

    Parameters
    ----------
    profile
        Name of the profile that no longer fits them.
    out
        JSON file to write.
    nodes
        A node that you vouch for; may be given again. Without any, all that worked under the profile.
    name
        Name of the new profile; empty for that of the old one.
    """
    from farflung.ops.recalibrate import recalibrate as recalibrate_from

    start_logging()
    recalibrate_from(folder, profile, out, nodes, name)


@app.command(group=BREAK)
def redteam(config: Path, *flags: Flags, attacks: str = "", at_once: int = 7, times: int = 1) -> None:
    """Run the gallery of adversaries against your own runs.

    A table says of each adversary what stopped it and what it gained.

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
    from farflung.adversity.evaluate import run_evaluation, show
    from farflung.redteam import GALLERY

    names = attacks.split(",") if attacks else list(GALLERY)
    show(run_evaluation(settings_of(config, flags), names, at_once, times))


@app.command(group=BREAK)
def chaos(config: Path, *flags: Flags, minutes: float = 30.0, json: bool = False) -> None:
    """Break a swarm on this machine, on a seeded schedule.

    Every role is killed, frozen or cut off; a table says what each fault cost.

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

    from farflung.adversity.chaos import run_chaos

    result = run_chaos(settings_of(config, flags), minutes, is_quiet=json)
    sys.stdout.write(json_module.dumps(result) + "\n")
    sys.exit(1 if result["invariant_violations"] else 0)


@app.command(group=JOIN)
def doctor(address: str = "", *, folder: Path = HOME) -> None:
    """Check this machine, and the way to a run.

    Everything that could keep it from taking part is named, each with the way to mend it.

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
    sys.exit(0 if asyncio.run(examine(url, expanded(folder), root)) else 1)
