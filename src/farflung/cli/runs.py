"""Commands for a whole run: start it, export it, keep it safe, stop it, roll it back."""

import asyncio
import sys
from pathlib import Path

from farflung.cli.app import RUN, SAFE, Flags, RunConfig, Url, app, end_with, settings_of, url_of
from farflung.config import load
from farflung.launch.logs import start_logging


@app.command(group=RUN, sort_key=1)
def run(config: Path, *flags: Flags, resume: bool = False, fresh: bool = False, plain: bool = False) -> None:
    """Run a whole experiment on this machine.

    It starts coordinator, trainer, validators, scorers and workers, each as a process of its own.

    Parameters
    ----------
    config
        A TOML file, such as examples/demo.toml.
    resume
        Go on with the run in its folder.
    fresh
        Throw away an older run of the same name.
    plain
        Print lines instead of the live view; where there is no terminal it does so anyway.
    """
    from farflung.launch.progress import Waits

    with Waits() as waits:  # first of all: the imports below take seconds on a slow machine
        waits(f"reading {config}, importing what it takes to run it")
        from farflung.launch.swarm import Swarm, prepare

        settings = settings_of(config, flags)
        prepare(settings, resume=resume, fresh=fresh)
        swarm = Swarm(settings, is_plain=plain or not sys.stdout.isatty(), waits=waits)
        sys.exit(asyncio.run(swarm.run()))


@app.command(group=RUN)
def export(run: Path, out: Path, step: int | None = None) -> None:
    """Write a run's policy as a Hugging Face folder.

    The folder has a model card, and its weights are checked against the recorded digest.

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


@app.command(group=RUN)
def filter_tasks(config: Path, *flags: Flags, out: Path, samples: int = 8, low: float = 0.1, high: float = 0.9) -> None:
    """Find training tasks of the right difficulty.

    The base model answers each task several times; tasks with a pass rate from --low to --high are written.

    Parameters
    ----------
    config
        The TOML file of a run; env.train_tasks tasks of its environment are tried.
    out
        File to write, for env.keep of the same run.
    samples
        Answers to each task.
    low
        Lowest pass rate of a task that is written.
    high
        Highest pass rate.
    """
    from farflung.ops.filter_tasks import Band
    from farflung.ops.filter_tasks import filter_tasks as choose

    start_logging()
    chosen, tried = asyncio.run(choose(load(config, flags), out, Band(samples, low, high)))
    sys.stdout.write(f"kept {len(chosen)} of {tried} tasks, those with {low:.0%} to {high:.0%} of {samples} right; ")
    sys.stdout.write(f'train on them with env.keep = "{out}"\n')


@app.command(group=SAFE)
def backup(config: RunConfig, *flags: Flags, to: Path) -> None:
    """Copy a run while it runs.

    The copy has keys, checkpoints, database and blobs; `farflung restore` goes on from it.

    Parameters
    ----------
    to
        A folder that is not there yet.
    """
    from farflung.ops.backup import back_up

    end_with(back_up(settings_of(config, flags), to))


@app.command(group=SAFE)
def restore(backup: Path, *, to: Path) -> None:
    """Make a run's folder from a backup, and check it.

    Parameters
    ----------
    backup
        The folder that `farflung backup` made.
    to
        The folder of runs, such as runs; the run gets its own there, which must not exist.
    """
    from farflung.ops.backup import restore as bring_back

    end_with(bring_back(backup, to))


@app.command(group=SAFE)
def breaker(config: RunConfig, *flags: Flags, close: bool = False, url: Url = "") -> None:
    """Show whether the circuit breaker is open, or close it.

    While it is open, because too many trusted nodes failed audits at once, no verdict is given and no step trained.
    Where only those under one numerics profile failed, it is open for them: they get no work and are not ejected.

    Parameters
    ----------
    close
        Let verdicts and training go on, once validators and weights were looked at.
    """
    from farflung.ops.operate import close_breaker, show_breaker

    settings = settings_of(config, flags)
    tell = close_breaker if close else show_breaker
    asyncio.run(tell(url_of(url, settings), settings))


@app.command(group=SAFE)
def rollback(config: RunConfig, *flags: Flags, to_step: int, without: tuple[str, ...] = (), url: Url = "") -> None:
    """Take up an earlier step again.

    The next step restores it, and the run goes on without the work of some nodes.

    Parameters
    ----------
    to_step
        The last step to keep; `farflung story STEP` names who contributed to each.
    without
        A node to eject without regard to evidence; may be given again.
    """
    from farflung.ops.operate import roll_back

    settings = settings_of(config, flags)
    asyncio.run(roll_back(url_of(url, settings), settings, to_step, without))
