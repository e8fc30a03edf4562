"""Commands that look at a running coordinator from a terminal."""

import time
from urllib.parse import quote

from rich.table import Table

from farflung.launch.screen import nodes_table, run_panel
from farflung.launch.terminal import Terminal
from farflung.net.client import Client
from farflung.net.session import Index
from farflung.protocol.errors import ConfigError
from farflung.protocol.identity import Key
from farflung.protocol.messages import Status, Story, VersionView, Weights


async def show_status(url: str, run: str) -> None:
    """Print a run's header and nodes."""
    client = Client(url, Key.make(), patience_s=5.0)
    status = await client.get(f"/v1/runs/{run or await _only_run(client)}/status", Status)
    await client.close()
    console = Terminal()
    console.print(run_panel(status))
    console.print(nodes_table(status, console.width))


async def show_weights(url: str, run: str) -> None:
    """Print the versions of a run's weights, newest first."""
    client = Client(url, Key.make(), patience_s=5.0)
    weights = await client.get(f"/v1/runs/{run or await _only_run(client)}/weights", Weights)
    await client.close()
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("step", "kind", "whole", "difference", "ratio", "coverage", "age"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for view in weights.versions:
        table.add_row(*_version_cells(view, weights))
    console = Terminal()
    console.print(table)
    for error in weights.node_errors:
        console.print(f"{error.name}: {error.said}")
    if weights.note:
        console.print(weights.note, style="dim")


def _version_cells(view: VersionView, weights: Weights) -> tuple[str, ...]:
    kind = "anchor" if view.anchor_bytes else "difference"
    difference = f"{view.delta_bytes:,}" if view.delta_bytes else "–"
    ratio = f"{view.full_bytes / view.delta_bytes:.1f}×" if view.delta_bytes else "–"
    coverage, age = f"{view.nodes}/{weights.nodes}", f"{max(0.0, weights.now - view.published_at):.0f} s"
    return str(view.step), kind, f"{view.full_bytes:,}", difference, ratio, coverage, age


async def _only_run(client: Client) -> str:
    index = await client.get("/v1", Index)
    if len(index.runs) != 1:
        raise ConfigError(f"{client.url} has the runs {', '.join(index.runs)}; name one with --run")
    return index.runs[0]


async def tell_story(url: str, subject: str) -> None:
    """Print every event of one id, oldest first."""
    client = Client(url, Key.make(), patience_s=5.0)
    story = await client.get(f"/v1/story/{quote(subject, safe='')}", Story)
    await client.close()
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("time", "what", "from", "to", "detail"):
        table.add_column(name)
    for event in story.events:
        clock = time.strftime("%H:%M:%S", time.localtime(event.at))
        table.add_row(clock, event.noun, event.before or "–", event.after, event.detail)
    Terminal().print(table)
