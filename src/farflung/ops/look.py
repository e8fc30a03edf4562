"""Commands that look at a running coordinator from a terminal."""

import time
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from farflung.ops.screen import nodes_table, run_panel
from farflung.protocol.client import Client
from farflung.protocol.errors import ConfigError
from farflung.protocol.identity import Key
from farflung.protocol.messages import Status, Story
from farflung.protocol.session import Index


async def show_status(url: str, run: str) -> None:
    """Print a run's header and nodes."""
    client = Client(url, Key.make(), patience_s=5.0)
    index = await client.get("/v1", Index)
    if not run and len(index.runs) != 1:
        raise ConfigError(f"{url} has the runs {', '.join(index.runs)}; name one with --run")
    status = await client.get(f"/v1/runs/{run or index.runs[0]}/status", Status)
    await client.close()
    console = Console(highlight=False)
    console.print(run_panel(status))
    console.print(nodes_table(status, console.width))


async def tell_story(url: str, subject: str) -> None:
    """Print every event of one id, oldest first."""
    client = Client(url, Key.make(), patience_s=5.0)
    story = await client.get(f"/v1/story/{quote(subject)}", Story)
    await client.close()
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("time", "what", "from", "to", "detail"):
        table.add_column(name)
    for event in story.events:
        clock = time.strftime("%H:%M:%S", time.localtime(event.at))
        table.add_row(clock, event.noun, event.before or "–", event.after, event.detail)
    Console(highlight=False).print(table)
