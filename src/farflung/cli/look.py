"""Commands that show a run, live or from its folder."""

import asyncio
import sys

from farflung.cli.app import LOOK, Address, RunFolder, WhichRun, app


@app.command(group=LOOK)
def status(url: Address, *, run: WhichRun = "") -> None:
    """Show a run at a glance."""
    from farflung.ops.show import show_status

    asyncio.run(show_status(url, run))


@app.command(group=LOOK)
def weights(url: Address, *, run: WhichRun = "") -> None:
    """List the versions of a run's weights.

    For each: bytes whole and as a difference, how many nodes have it, its age.
    """
    from farflung.ops.show import show_weights

    asyncio.run(show_weights(url, run))


@app.command(group=LOOK)
def story(id: str, *, url: Address) -> None:
    """Tell everything that happened to one id.

    The id is of a node, lease, rollout, group, step or audit.

    Parameters
    ----------
    id
        The id, as the dashboard, the logs or another story show it.
    """
    from farflung.ops.show import tell_story

    asyncio.run(tell_story(url, id))


@app.command(group=LOOK)
def view(folder: RunFolder, *, host: str = "127.0.0.1", port: int = 0) -> None:
    """Open the dashboard over a finished run, read only.

    Parameters
    ----------
    host
        Address to listen on.
    port
        Port to listen on; 0 for any free one.
    """
    from farflung.launch.view import view as serve_view

    serve_view(folder, host, port)


@app.command(group=LOOK)
def report(folder: RunFolder) -> None:
    """Write a run's report.html again.

    It is made from the run's database and metrics.jsonl.
    """
    from farflung.launch.report import write_report
    from farflung.launch.summary import summarise

    sys.stdout.write(f"{asyncio.run(write_report(folder, summarise(folder)))}\n")


@app.command(group=LOOK)
def summary(folder: RunFolder) -> None:
    """Recompute a run's figures and print them.

    They are made from the run's database and metrics.jsonl, as summary.json is at the end of a run.
    """
    import json as json_module

    from farflung.launch.summary import summarise

    sys.stdout.write(json_module.dumps(summarise(folder), indent=2) + "\n")
