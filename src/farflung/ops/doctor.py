"""`farflung doctor`: what could keep this machine from taking part, each ✗ with the way to mend it."""

import os
import shutil
import stat
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.text import Text

from farflung.config import WorkerSection
from farflung.config.idle import preferences_in, read_preferences
from farflung.launch.terminal import Terminal
from farflung.net.client import Client
from farflung.net.server import listen
from farflung.net.session import Index, Session, check_run
from farflung.ops.preferences import observe
from farflung.protocol.errors import ConfigError, FarflungError
from farflung.protocol.identity import CLOCK_SKEW_S, Key, Signed, node_id, readable_name
from farflung.protocol.messages import VERSION, Run, Status
from farflung.weights.manifest import open_manifest

SPARE_BYTES = 1 << 30
PATIENCE_S = 2.0
"""For a coordinator that is busy for a moment; a fault would be said of one."""


@dataclass(frozen=True)
class Finding:
    """One check."""

    what: str
    is_well: bool
    text: str
    mend: str = ""
    figure: float = 0.0
    """Tokens a second that are expected, if that is what was found."""


async def doctor(url: str, folder: Path, root: bytes | None) -> bool:
    """Print every finding; whether nothing is in the way."""
    console = Terminal()
    is_well = True
    async for finding in examine(url, folder, root):
        is_well &= finding.is_well
        show(console, finding)
    return is_well


def show(console: Console, finding: Finding) -> None:
    """One line, and the mend below it where one is needed."""
    mark = ("✓", "green") if finding.is_well else ("✗", "red")
    console.print(Text.assemble(mark, f" {finding.what:<12} {finding.text}"), soft_wrap=True)
    if not finding.is_well:
        console.print(Text(f"  {finding.mend}", "yellow"), soft_wrap=True)


async def examine(
    url: str, folder: Path, root: bytes | None, settings: WorkerSection | None = None, *, is_joining: bool = False
) -> AsyncIterator[Finding]:
    """This machine first, then the way to the coordinator and what its run needs of a node with these settings.

    A node that joins tries its arithmetic as a worker, and not here.
    """
    settings = settings or WorkerSection()
    engines = (_torch, *(check for engine, check in EXTRAS.items() if engine == settings.engine))
    checks = (_python, *engines, lambda: _device(settings), lambda: _key(folder), lambda: _disk(folder, 0), _ports)
    for check in checks:
        yield check()
    if not is_joining:
        yield _owner(folder)
    if url:
        async for finding in _remote(url, folder, root, settings, is_joining=is_joining):
            yield finding


def _python() -> Finding:
    found = sys.version.split()[0]
    return Finding("python", sys.version_info >= (3, 11), found, "install Python 3.11 or later")


def _torch() -> Finding:
    try:
        found = version("torch")
        version("transformers")
    except PackageNotFoundError as error:
        return Finding("torch", False, f"{error.name} is missing", "pip install 'farflung[learn]'")
    return Finding("torch", True, found)


def _extra(what: str, extra: str, package: str, other: str) -> Finding:
    """The two packages of an extra, for an engine that needs them."""
    try:
        found = f"{version(package)}, {other} {version(other)}"
    except PackageNotFoundError as error:
        return Finding(what, False, f"{error.name} is missing", f"pip install 'farflung[{extra}]'")
    return Finding(what, True, found)


EXTRAS = {
    "mlx": partial(_extra, "mlx", "mlx", "mlx", "mlx-lm"),
    "llama.cpp": partial(_extra, "llama.cpp", "llama-cpp", "llama-cpp-python", "gguf"),
}
"""By engine, what it needs beside torch."""


def _device(settings: WorkerSection) -> Finding:
    try:
        from farflung.ops.machine import device  # torch takes seconds, and may be missing

        return Finding("device", True, device(settings))
    except ImportError as error:
        return Finding("device", False, f"cannot be looked at without {error.name}", "pip install 'farflung[learn]'")
    except FarflungError as error:
        return Finding("device", False, str(error), "choose another with --device")


def _key(folder: Path) -> Finding:
    path = folder / "key"
    if not path.exists():
        return Finding("key", True, f"none yet; {path} will be made, readable by you alone")
    try:
        key = Key.load_or_make(path)
    except ConfigError as error:
        return Finding("key", False, str(error), f"mv {path} {path}.broken")
    is_private = not stat.S_IMODE(path.stat().st_mode) & 0o077
    sentence = f"{readable_name(key.id)} ({key.id}) in {path}"
    return Finding("key", is_private, sentence, f"others can read it; chmod 600 {path}")


def _disk(folder: Path, need_bytes: int) -> Finding:
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free - SPARE_BYTES
    is_well = free > need_bytes and os.access(place, os.W_OK)
    sentence = f"{free / 1e9:.1f} GB free in {place}, {need_bytes / 1e9:.2f} GB needed"
    return Finding("disk", is_well, sentence, "free some space, or choose another place with --folder")


def _ports() -> Finding:
    try:
        listen("127.0.0.1", 0).close()
    except ConfigError as error:
        return Finding("ports", False, str(error), "close the programs that hold all ports; a relay needs one")
    return Finding("ports", True, "a worker needs none, a relay could open one")


def _owner(folder: Path) -> Finding:
    """What would be seen of the machine's owner, for `--when-idle`."""
    try:
        rules = read_preferences(preferences_in(folder))
    except ConfigError as error:
        return Finding("idle", False, str(error), "see `farflung idle --help`")
    return Finding("idle", True, "\n               ".join(observe(rules)))


# --- the coordinator and its run -------------------------------------------------------------------------------------


async def _remote(
    url: str, folder: Path, root: bytes | None, settings: WorkerSection, *, is_joining: bool
) -> AsyncIterator[Finding]:
    client = Client(url, Key.make(), patience_s=PATIENCE_S)
    try:
        index = await client.get("/v1", Index)
        yield _protocol(url, index)
        for run in index.runs:
            status = await client.get(f"/v1/runs/{run}/status", Status)
            yield _clock(status.now)
            async for finding in _run(client, run, folder, root, status, settings, is_joining=is_joining):
                yield finding
    except FarflungError as error:
        yield Finding("coordinator", False, str(error), f"check the address {url}, this machine's network and a proxy")
    finally:
        await client.close()


def _protocol(url: str, index: Index) -> Finding:
    is_well = index.minimum_version <= VERSION <= index.version
    sentence = f"{url} speaks protocol {index.minimum_version} to {index.version}, this node {VERSION}"
    return Finding("coordinator", is_well, sentence, "pip install -U farflung")


def _clock(theirs: float) -> Finding:
    skew_s = time.time() - theirs
    sentence = f"{skew_s:+.1f} s from the coordinator's, {CLOCK_SKEW_S} s are allowed"
    return Finding(
        "clock", abs(skew_s) < CLOCK_SKEW_S, sentence, "set this machine's clock, for instance with ntpd or timedatectl"
    )


async def _run(
    client: Client,
    run: str,
    folder: Path,
    root: bytes | None,
    status: Status,
    settings: WorkerSection,
    *,
    is_joining: bool,
) -> AsyncIterator[Finding]:
    answer = await client.get(f"/v1/runs/{run}", Run)
    try:
        checked = check_run(answer, run, root)
    except FarflungError as error:
        yield Finding("descriptor", False, str(error), "ask the operator for the right address; do not join")
        return
    yield Finding("descriptor", True, f"run {run!r} is vouched for by root {node_id(answer.root)}")
    session = Session(client, run, answer.root, checked)
    async for finding in _capacity(session, settings):
        yield finding
    if not status.latest.manifest:
        yield Finding("weights", True, "none published yet")
        return
    signed = await client.get(f"/v1/runs/{run}/manifests/{status.latest.manifest}", Signed)
    manifest = open_manifest(signed, checked.keys("weights", time.time()), run, status.latest.manifest)
    size_bytes = manifest.full_bytes
    yield Finding("weights", True, f"step {manifest.step}, {size_bytes / 1e9:.3f} GB, signature and digest are right")
    yield _disk(folder, size_bytes)
    if not is_joining:
        yield await _numerics(session, folder, status.latest.manifest)


async def _capacity(session: Session, settings: WorkerSection) -> AsyncIterator[Finding]:
    """Whether the run's model fits this machine, and how fast it would be, before anything of it is fetched."""
    from farflung.ops.machine import Machine  # torch takes seconds

    machine = Machine(session, settings)
    try:
        yield Finding("room", True, await machine.capacity())
        expected = await machine.expected_tokens_per_s()
    except FarflungError as error:
        yield Finding("room", False, str(error), "choose what would fit, or join another run")
        return
    if expected:
        sentence = f"{expected:,.0f} tokens/s expected, as measured for short answers with weights that are made up"
        yield Finding("speed", True, sentence, figure=expected)


async def _numerics(session: Session, folder: Path, manifest: str) -> Finding:
    """Try this machine on what the trainer generated."""
    from farflung.ops.try_numerics import attempt  # torch takes seconds, and other findings need none

    try:
        tried = await attempt(session, folder, manifest)
    except FarflungError as error:
        return Finding("numerics", False, f"cannot be tried: {error}", "see above; a worker tries again when it joins")
    if tried is None:
        return Finding("numerics", True, "no version here has a self-test; a worker makes one when one has")
    return Finding("numerics", tried.is_forgiven, tried.text, "a worker would refuse to start")
