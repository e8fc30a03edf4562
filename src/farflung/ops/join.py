"""`farflung join`: from an address to a working node, with a look at the machine first and its earnings last."""

import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.text import Text

from farflung.config import IdleSection, WorkerSection
from farflung.launch.terminal import Terminal
from farflung.net.client import Client
from farflung.net.session import Index, hardware
from farflung.ops import doctor
from farflung.ops.several import run_node
from farflung.protocol.errors import ConfigError, FarflungError
from farflung.protocol.identity import KEY_BYTES, Key, readable_name
from farflung.protocol.messages import NodeView, Status
from farflung.protocol.shown import one_line

BENCHMARK_S = 0.5
SIZE = 768


def parse(address: str) -> tuple[str, bytes | None]:
    """`https://host:port#root` as URL and root key; without the fragment the first root met is believed."""
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        is_well = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # half a bracket, a port beyond 65535
        parts, is_well = urlsplit(""), False
    if not is_well:
        raise ConfigError(f"{address!r} is no address; write https://host:port, as the operator gave it to you")
    try:
        root = bytes.fromhex(parts.fragment)
    except ValueError:
        root = b"?"
    if root and len(root) != KEY_BYTES:
        raise ConfigError(f"the part behind # in {address!r} is no root key of {KEY_BYTES} bytes in hex; copy it again")
    return f"{parts.scheme}://{parts.netloc}", root or None


async def join(
    address: str,
    folder: Path,
    settings: WorkerSection,
    *,
    name: str,
    run: str,
    invite: str,
    is_checked: bool,
    is_json: bool = False,
    idle: IdleSection | None = None,
) -> None:
    """Check, work, and tell what came of it. Raises ConfigError if the machine cannot take part."""
    url, root = parse(address)
    console = Terminal()
    folder.mkdir(parents=True, exist_ok=True)
    key = Key.load_or_make(folder / "key")
    who = (name or readable_name(key.id), "bold")
    console.print(Text.assemble("You are ", who, f", node {key.id}, key in {folder / 'key'}"), soft_wrap=True)
    machine = hardware()
    console.print(
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 1e9:.1f} GB, {benchmark(settings):.0f} GFLOP/s"
    )
    expected = await _preflight(console, url, folder, root, settings) if is_checked else 0.0
    options = {"run": run, "root": root, "name": name, "invite": invite, "expected_tokens_per_s": expected}
    options |= {"idle": idle}
    try:
        await run_node(url, key, folder, settings, options, is_json=is_json)
    finally:
        await tell_earnings(console, url, key.id)


async def _preflight(console: Console, url: str, folder: Path, root: bytes | None, settings: WorkerSection) -> float:
    """Show every finding; gives the tokens a second that are expected. Raises ConfigError if one is in the way."""
    ill, expected = 0, 0.0
    async for finding in doctor.examine(url, folder, root, settings, is_joining=True):
        doctor.show(console, finding)
        ill += not finding.is_well
        expected = max(expected, finding.figure)
    if ill:
        raise ConfigError(f"{ill} checks failed; mend them, or join all the same with --unchecked")
    return expected


def benchmark(settings: WorkerSection) -> float:
    """float32 GFLOP/s of a matrix product on this node's threads: for people to read; no role believes it."""
    import torch

    torch.set_num_threads(settings.threads)
    a_NN = torch.ones(SIZE, SIZE)
    a_NN @ a_NN
    since, rounds = time.monotonic(), 0
    while time.monotonic() - since < BENCHMARK_S:
        a_NN @ a_NN
        rounds += 1
    return rounds * 2 * SIZE**3 / (time.monotonic() - since) / 1e9


async def tell_earnings(console: Console, url: str, node: str) -> None:
    """Tell the operator what this node's account shows as it leaves."""
    client = Client(url, Key.make(), patience_s=0.0)
    try:
        view = await _view(client, node)
    except FarflungError as error:
        sys.stderr.write(f"this node's earnings cannot be shown now: {one_line(str(error))}\n")
        return
    finally:
        await client.close()
    if view is not None:
        console.print(
            f"{view.name} leaves with {view.credit:,} tokens of credit and {view.escrow:,} in escrow, "
            f"for {view.accepted:,} accepted rollouts ({view.rejected:,} rejected); status: {view.status}",
            soft_wrap=True,
        )


async def _view(client: Client, node: str) -> NodeView | None:
    for run in (await client.get("/v1", Index)).runs:
        status = await client.get(f"/v1/runs/{run}/status", Status)
        for view in status.nodes:
            if view.node == node:
                return view
    return None
