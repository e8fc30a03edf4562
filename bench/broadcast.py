"""How long a version takes to reach everybody: a coordinator, relays and clients in network namespaces of their own.

Prints one JSON object as its last line. Links are veth pairs at a bridge, with rates by tbf: clients 50 Mbit/s, relays
400, the origin 200. Coordinator and relays are the shipped commands, clients the shipped fetching and patching. The
payload is SmolLM2-135M as published, then the difference of a real step (`--pairs` DIR has them from
`bench/weights.py --keep DIR`; without it a step is trained first). Beside it runs shardcast 0.3.2, in an environment of
its own, over the same links, asked once a second. Needs Linux, root (or CAP_NET_ADMIN and CAP_SYS_ADMIN), `ip`, `tc`,
and `wget` for shardcast. `--quick` takes 8 clients, 2 relays and a part of the weights; the full command is
`python bench/broadcast.py`.
"""

import argparse
import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farflung.net.client import Client
from farflung.net.session import Session
from farflung.protocol.errors import FarflungError
from farflung.protocol.identity import Key
from farflung.protocol.messages import Commit, Done, Rollback
from farflung.weights import patch as patching
from farflung.weights.cache import Versions
from farflung.weights.manifest import manifest_digest, open_manifest
from farflung.weights.plan import FetchPlan

ROOT = Path(__file__).parents[1]
SMOL = ROOT / "models" / "smollm2-135m"
RUN, PORT, RELAY_PORT = "broadcast", 8439, 7000
ORIGIN_MBIT, RELAY_MBIT, CLIENT_MBIT = 200, 400, 50
BURST_BYTES = 256 << 10
"""What a link lets through at once: no smaller than the segments that the kernel hands over as one."""
SEGMENTS = 16
"""Of 1,448 bytes that the kernel hands over as one: these cores do what all the machines' network cards would."""
LR = 1e-5
ASK_S = 1.0
"""How often a client asks for the latest version, of farflung and of shardcast alike."""
NEWNET = 0x40000000
SHARDCAST = "shardcast==0.3.2"


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%X')} {text}\n")


# --- links -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """One machine: its namespace, address and rate."""

    space: str
    address: str
    mbit: int


class Links:
    """Namespaces around a bridge, which is in one too; nothing outside of them changes."""

    def __init__(self) -> None:
        self._prefix = f"ff{os.getpid()}"
        self._hub = f"{self._prefix}hub"
        self._spaces: list[str] = []

    def __enter__(self) -> "Links":
        try:
            self._add_space(self._hub)
            run("ip", "-n", self._hub, "link", "add", "br0", "type", "bridge")
            run("ip", "-n", self._hub, "link", "set", "br0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for space in reversed(self._spaces):
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def add(self, name: str, address: str, mbit: int) -> Node:
        """One more machine, with a line of that rate in both directions."""
        space, port = f"{self._prefix}{name}", f"v{name}"
        self._add_space(space)
        run("ip", "-n", self._hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
        run("ip", "-n", self._hub, "link", "set", port, "master", "br0", "up")
        run("ip", "-n", space, "addr", "add", f"{address}/16", "dev", "eth0")
        for where, device in ((space, "lo"), (space, "eth0")):
            run("ip", "-n", where, "link", "set", device, "up")
        run("ip", "netns", "exec", space, "sysctl", "-qw", f"net.ipv4.tcp_min_tso_segs={SEGMENTS}")
        for where, device in ((space, "eth0"), (self._hub, port)):
            shape = ("rate", f"{mbit}mbit", "burst", str(BURST_BYTES), "latency", "50ms")
            run("tc", "-n", where, "qdisc", "add", "dev", device, "root", "tbf", *shape)
        return Node(space, address, mbit)

    def _add_space(self, name: str) -> None:
        run("ip", "netns", "add", name)
        self._spaces.append(name)


def run(*command: str) -> str:
    """Output of a command. Raises SystemExit with what it says."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def sent_bytes(node: Node) -> int:
    """Bytes that have left a machine, headers included."""
    return int(run("ip", "netns", "exec", node.space, "cat", "/sys/class/net/eth0/statistics/tx_bytes"))


def why_not() -> str:
    """Why namespaces with rates cannot be had here; empty if they can."""
    if missing := [tool for tool in ("ip", "tc") if not shutil.which(tool)]:
        return f"{' and '.join(missing)} not found; install iproute2"
    try:
        with Links() as links:
            links.add("try", "10.77.9.9", 10)
    except SystemExit as error:
        return f"network namespaces with tbf are not permitted here ({error})"
    return ""


# --- processes -------------------------------------------------------------------------------------------------------


class Processes:
    """What this benchmark started; all of it ends with it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._pids, self._started = folder, list[int](), list[subprocess.Popen[bytes]]()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def start(self, node: Node, name: str, *command: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """A command on one machine; what it says is in a log."""
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", node.space, *command],
                stdin=subprocess.PIPE, stdout=log, stderr=log, process_group=0, cwd=self._folder,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
            )  # fmt: skip
        self._started.append(process)
        return process

    def fork(self, node: Node, work: Callable[[], None]) -> None:
        """A copy of this process on one machine, which is much cheaper than a fresh one."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            self._pids.append(pid)
            return
        code = 1
        try:
            enter(node)
            work()
            code = 0
        except BaseException as error:  # noqa: BLE001
            say(f"{node.space} failed: {type(error).__name__}: {error}")
        finally:
            os._exit(code)


def enter(node: Node) -> None:
    """Move this process to a machine's network."""
    with open(f"/run/netns/{node.space}") as space:
        if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {node.space}")


class Marks:
    """Lines that processes append to one file, and how to wait for them. Times are of the machine's monotonic clock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def note(self, **values: Any) -> None:
        """One line."""
        with self._path.open("a") as file:
            file.write(json.dumps({"at": time.monotonic()} | values) + "\n")

    def wait(self, count: int, limit_s: float, **values: Any) -> list[dict[str, Any]]:
        """The lines with these values, once there are so many of them or time is up."""
        until = time.monotonic() + limit_s
        while True:
            lines = [json.loads(line) for line in self._path.read_text().splitlines()]
            found = [line for line in lines if values.items() <= line.items()]
            if len(found) >= count or time.monotonic() > until:
                return found
            time.sleep(0.2)


# --- ours ------------------------------------------------------------------------------------------------------------


CONFIG = """
[run]
name = "{run}"
dir = "{folder}"
steps = 10
[model]
path = "{model}"
[env]
train_tasks = 64
eval_tasks = 8
[lease]
heartbeat_s = 5.0
[learn]
groups = 4
[trust]
canaries = 0
self_test = 0
[coordinator]
host = "{host}"
port = {port}
"""


def client(folder: Path, url: str, root: bytes, number: int, marks: Marks) -> None:
    """One node as far as weights go: asks for the latest version, fetches, patches, and notes when it was done.

    Patching is one client's at a time: they share this machine's cores, which they would not elsewhere. Waiting for
    that is not counted.
    """
    waited = [0.0]

    def patch(way: FetchPlan, whole: Callable[[str], Path], path: Callable[[str], Path]) -> None:
        before = time.monotonic()
        with (folder.parent / "turn").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            waited[0] = time.monotonic() - before
            patching.patch(way, whole, path)

    async def live() -> None:
        session = await Session.open(Client(url, Key.make()), "worker", root=root, name=f"client-{number}")
        versions = Versions(session, folder, keep=1, patch=patch)
        marks.note(event="ready", client=number)
        seen = ""
        while not session.is_over:
            await asyncio.sleep(ASK_S)
            await session.refresh()
            digest = session.latest.manifest
            if digest in ("", seen):
                continue
            waited[0] = 0.0
            try:
                manifest = await versions.fetch(digest)
            except FarflungError as error:
                say(f"client {number}: {error}")
                continue
            marks.note(event="done", client=number, step=manifest.step, waited_s=waited[0])
            seen = digest

    asyncio.run(live())


def warm_up() -> None:
    """Have everything imported before clients are forked off, as it is in a node that has run for a while."""

    async def once() -> None:
        line = Client("http://127.0.0.1:9", Key.make(), patience_s=0.0)
        with contextlib.suppress(FarflungError):
            await line.download("/")
        await line.close()

    asyncio.run(once())


def trainer(folder: Path, url: str, pair: Sequence[Path], marks: Marks, go: Path) -> None:
    """Publishes the first of a pair as step 0 and, told to go on, the second as step 1."""
    from safetensors.torch import load_file

    from farflung.rollouts.batch import claim
    from farflung.weights.publish import Publisher

    keys = folder / RUN / "keys"
    key, operator = Key.load_or_make(keys / "trainer"), Key.load_or_make(keys / "coordinator")

    async def publish(session: Session, publisher: Publisher, step: int) -> None:
        batch = (await claim(session, step, 5.0)).batch
        assert batch is not None, f"step {step} is not to be had"
        tensors = load_file(pair[step]).items()
        signed = await publisher.publish(
            tensors, step=step, parent=session.latest.manifest, commitment=batch.secret_commitment, now=time.time()
        )
        manifest = open_manifest(signed, key.public, session.run, manifest_digest(signed))
        marks.note(
            event="published", step=step, full_bytes=manifest.full_bytes,
            size_bytes=manifest.delta_bytes if step else manifest.anchor_bytes,
        )  # fmt: skip
        commit = Commit(manifest=signed, metrics={}, restores=batch.restores)
        await session.client.post(session.path(f"steps/{step}/commit"), commit, Done)
        await session.refresh()

    async def live() -> None:
        session = await Session.open(Client(url, key), "trainer", name="trainer")
        publisher = Publisher(session.client, key, session.run, 16)
        await publish(session, publisher, 0)
        while not go.exists():
            await asyncio.sleep(0.05)
        # The next step is opened by rolling back, which needs no rollouts; what is published is the pair's second half.
        line = Client(url, operator, tag=session.client.tag)
        await line.post(f"/v1/admin/runs/{RUN}/rollback", Rollback(to_step=0), Done)
        await publish(session, publisher, 1)

    asyncio.run(live())


@dataclass(frozen=True)
class Spread:
    """How one version spread."""

    size_bytes: int
    took_s: list[float]
    """Seconds from publishing until each client had it, checked and patched."""
    origin_bytes: int

    @property
    def time_s(self) -> float:
        return max(self.took_s)

    @property
    def one_copy_s(self) -> float:
        """One copy over one client's line."""
        return self.size_bytes * 8 / CLIENT_MBIT / 1e6

    @property
    def copies(self) -> float:
        return self.origin_bytes / self.size_bytes


@dataclass(frozen=True)
class World:
    """The machines."""

    origin: Node
    relays: list[Node]
    clients: list[Node]


def world(links: Links, relays: int, clients: int) -> World:
    return World(
        links.add("o", "10.77.0.1", ORIGIN_MBIT),
        [links.add(f"r{number}", f"10.77.1.{number + 1}", RELAY_MBIT) for number in range(relays)],
        [links.add(f"c{number}", f"10.77.2.{number + 1}", CLIENT_MBIT) for number in range(clients)],
    )


def ours(world: World, folder: Path, pair: Sequence[Path], limit_s: float) -> tuple[Spread, Spread]:
    """A whole version to all, then the difference of a step."""
    url, marks, go = f"http://{world.origin.address}:{PORT}", Marks(folder / "marks"), folder / "go"
    config = folder / "run.toml"
    config.write_text(
        CONFIG.format(
            run=RUN, folder=folder, model=ROOT / "examples" / "base", host=world.origin.address, port=PORT
        )
    )  # fmt: skip
    farflung = (sys.executable, "-m", "farflung")
    with Processes(folder) as processes:
        processes.start(world.origin, "coordinator", *farflung, "coordinator", str(config))
        wait_for(folder / RUN / "coordinator.url", 60)
        root = Key.load_or_make(folder / RUN / "keys" / "root").public
        warm_up()
        for number, node in enumerate(world.relays):
            processes.start(
                node, f"relay-{number}", *farflung, "relay", url, "--folder", f"relay-{number}",
                "--host", node.address, "--port", str(RELAY_PORT), "--root", root.hex(),
            )  # fmt: skip
        for number, node in enumerate(world.clients):
            place = folder / f"client-{number}"
            processes.fork(node, lambda place=place, number=number: client(place, url, root, number, marks))
        marks.wait(len(world.clients), 60, event="ready")
        wait_for_relays(world.origin, url, len(world.relays), 60)
        say("everybody is here")
        processes.fork(world.origin, lambda: trainer(folder, url, pair, marks, go))
        whole = spread(world, marks, 0, limit_s)
        go.touch()
        return whole, spread(world, marks, 1, 2 * limit_s)  # patched one after the other


def spread(world: World, marks: Marks, step: int, limit_s: float) -> Spread:
    """Wait until everybody has a step. Raises SystemExit if somebody never has."""
    before = sent_bytes(world.origin)
    published = marks.wait(1, limit_s, event="published", step=step)
    done = marks.wait(len(world.clients), limit_s, event="done", step=step)
    if not published or len(done) < len(world.clients):
        raise SystemExit(f"step {step} reached {len(done)} of {len(world.clients)} clients in {limit_s:.0f} s")
    took = [one["at"] - published[0]["at"] - one["waited_s"] for one in done]
    found = Spread(published[0]["size_bytes"], sorted(took), sent_bytes(world.origin) - before)
    say(f"step {step}: {found.size_bytes:,} bytes to all in {found.time_s:.1f} s, {found.copies:.2f} copies sent")
    return found


def wait_for(path: Path, limit_s: float) -> None:
    until = time.monotonic() + limit_s
    while not path.exists():
        if time.monotonic() > until:
            raise SystemExit(f"{path} did not come in {limit_s:.0f} s; see the logs in {path.parents[1]}")
        time.sleep(0.1)


def wait_for_relays(origin: Node, url: str, count: int, limit_s: float) -> None:
    """Until the coordinator lists so many relays. Raises SystemExit."""
    until = time.monotonic() + limit_s
    while True:
        ask = f"import httpx2; print(httpx2.get('{url}/v1/runs/{RUN}/relays').json())"
        found = run("ip", "netns", "exec", origin.space, sys.executable, "-c", ask)
        if found.count("http://") == count:
            return
        if time.monotonic() > until:
            raise SystemExit(f"only {found.count('http://')} of {count} relays came in {limit_s:.0f} s")
        time.sleep(0.5)


# --- shardcast -------------------------------------------------------------------------------------------------------


ORIGIN = """
import sys, shardcast
folder, file, port = sys.argv[1:4]
shardcast.initialize(folder, int(port))
print("ready", flush=True)
sys.stdin.readline()
shardcast.broadcast(file)
sys.stdin.readline()
"""
CLIENT = """
import json, sys, time
from shardcast.client_node import ClientNode
servers, folder, number, marks = sys.argv[1].split(","), sys.argv[2], int(sys.argv[3]), sys.argv[4]

def note(event):
    with open(marks, "a") as file:
        file.write(json.dumps({"at": time.monotonic(), "event": event, "client": number}) + "\\n")

node = ClientNode(servers, folder)
note("ready")
while "v1" not in node.list_available_versions():
    time.sleep(1)
while node.download_version("v1") is None:
    time.sleep(1)
note("done")
"""


def shardcast_home(folder: Path) -> Path:
    """An environment with shardcast alone."""
    home = folder / "shardcast"
    run(sys.executable, "-m", "venv", str(home))
    run(str(home / "bin" / "pip"), "install", "-q", SHARDCAST)
    return home


def theirs(world: World, folder: Path, payload: Path, limit_s: float) -> tuple[float, int]:
    """Seconds until all clients have a file by shardcast, and how many had it when time was up.

    Every process has a copy of the package of its own, which keeps a scratch file beside itself. Servers hold a small
    `data1.bin`, which clients want to measure.
    """
    home, marks = shardcast_home(folder), Marks(folder / "theirs")
    packages = next(home.glob("lib/*/site-packages"))
    python = str(home / "bin" / "python")

    def place(name: str) -> tuple[Path, dict[str, str]]:
        own = folder / f"{name}-home"
        shutil.copytree(packages / "shardcast", own / "shardcast")
        data = folder / f"{name}-data"
        data.mkdir()
        (data / "data1.bin").write_bytes(bytes(100_000))
        return data, {"PYTHONPATH": str(own), "SHARDCAST_LOG_LEVEL": "ERROR"}

    with Processes(folder) as processes:
        data, env = place("origin")
        origin = processes.start(
            world.origin, "their-origin", python, "-c", ORIGIN, str(data), str(payload), "8000", env=env
        )
        time.sleep(2)
        for number, node in enumerate(world.relays):
            data, env = place(f"middle-{number}")
            middle = ("-c", "from shardcast.middle_node import main; main()")
            middle += ("--upstream", f"http://{world.origin.address}:8000")
            processes.start(
                node, f"middle-{number}", python, *middle, "--data-dir", str(data), "--check-interval", "1", env=env
            )
            time.sleep(1)  # they measure their servers by way of one file in /tmp, each in turn
        servers = ",".join(f"http://{node.address}:8000" for node in world.relays)
        for number, node in enumerate(world.clients):
            data, env = place(f"their-client-{number}")
            processes.start(
                node, f"their-client-{number}", python, "-c", CLIENT, servers, str(data), str(number),
                str(folder / "theirs"), env=env,
            )  # fmt: skip
            marks.wait(number + 1, 20, event="ready")
        assert origin.stdin is not None
        before = time.monotonic()
        origin.stdin.write(b"go\n")
        origin.stdin.flush()
        done = marks.wait(len(world.clients), limit_s, event="done")
        last = max((one["at"] for one in done), default=0.0)
        return (last if len(done) == len(world.clients) else time.monotonic()) - before, len(done)


# --- all of it -------------------------------------------------------------------------------------------------------


def pair_of(folder: Path, pairs: Path | None, limit_bytes: int) -> tuple[list[Path], str]:
    """Two versions of the weights as files, and what they are."""
    import torch
    from safetensors.torch import load_file, save_file

    if pairs is None and SMOL.exists():
        say(f"training a step of {LR:.0e}; --pairs DIR would spare that")
        keep = folder / "pairs"
        run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r})\n"
            f"from pathlib import Path; import weights\n"
            f"weights.pair({LR}, 2, Path({str(keep)!r}), is_dithered=True)")  # fmt: skip
        pairs = keep
    if pairs is None:
        torch.manual_seed(0)
        old = {f"w{n}": (torch.randn(1 << 20) * 0.05).bfloat16() for n in range(limit_bytes >> 21)}
        new = {
            name: (tensor.float() - LR * torch.randn(tensor.shape).sign()).bfloat16() for name, tensor in old.items()
        }
        found, what = [old, new], "made up: models/smollm2-135m is missing, see scripts/get_smollm2.py"
    else:
        found = [load_file(pairs / f"{LR:.0e}-{step}.safetensors") for step in (3, 4)]
        names, size = [], 0
        for name, tensor in found[0].items():
            if size + tensor.nbytes <= limit_bytes:
                names, size = [*names, name], size + tensor.nbytes
        found = [{name: one[name] for name in names} for one in found]
        what = f"SmolLM2-135M, third and fourth step at {LR:.0e}"
    files = [folder / f"{number}.safetensors" for number in range(2)]
    for file, tensors in zip(files, found, strict=True):
        save_file(tensors, file)
    return files, what


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--pairs", type=Path, help="folder of bench/weights.py --keep")
    parser.add_argument("--clients", type=int, help="how many; 32, or 8 with --quick")
    parser.add_argument("--relays", type=int, help="how many; 4, or 2 with --quick")
    parser.add_argument("--mb", type=int, help="most of the weights to take; 64 with --quick")
    parser.add_argument("--limit-s", type=float, default=300.0, help="how long to wait for everybody")
    parser.add_argument("--no-peer", action="store_true", help="without shardcast")
    parser.add_argument("--scratch", type=Path, help="where to put some 20 GB; a temporary folder by default")
    arguments = parser.parse_args()
    if reason := why_not():
        sys.stdout.write(json.dumps({"clients": 0, "skipped": reason}) + "\n")
        raise SystemExit(f"broadcast: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    clients = arguments.clients or (8 if arguments.quick else 32)
    relays = arguments.relays or (2 if arguments.quick else 4)
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="broadcast-") as name, Links() as links:
        folder = Path(name)
        pair, what = prepare(folder, arguments.pairs, (arguments.mb or (64 if arguments.quick else 1 << 10)) << 20)
        machines = world(links, relays, clients)
        whole, step = ours(machines, folder, pair, arguments.limit_s)
        result: dict[str, Any] = {
            "clients": clients, "relays": relays, "payload": what, "payload_bytes": whole.size_bytes,
            "one_copy_s": whole.one_copy_s, "time_to_first_s": whole.took_s[0], "time_to_all_s": whole.time_s,
            "time_ratio_all_to_one": whole.time_s / whole.one_copy_s, "origin_copies": whole.copies,
            "delta_bytes": step.size_bytes, "delta_time_to_all_s": step.time_s, "delta_origin_copies": step.copies,
            "shardcast_ratio_full": None, "shardcast_ratio_delta": None, "load": os.getloadavg()[0],
        }  # fmt: skip
        say(json.dumps(result))
        if not arguments.no_peer:
            result |= beside(machines, folder, pair[1], arguments.limit_s, whole, step)
    sys.stdout.write(json.dumps(result | {"quick": arguments.quick}) + "\n")


def prepare(folder: Path, pairs: Path | None, limit_bytes: int) -> tuple[list[Path], str]:
    """As `pair_of`, in a process that ends: this one forks, and must stay without torch."""
    files = [folder / f"{number}.safetensors" for number in range(2)]
    said = folder / "what"
    pid = os.fork()
    if not pid:
        try:
            said.write_text(pair_of(folder, pairs, limit_bytes)[1])
            os._exit(0)
        except BaseException as error:  # noqa: BLE001
            say(f"no payload: {error}")
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the payload could not be made")
    return files, said.read_text()


def beside(machines: World, folder: Path, payload: Path, limit_s: float, whole: Spread, step: Spread) -> dict[str, Any]:
    """The same by shardcast: how many times longer it takes. A ratio at the limit is a lower bound."""
    if not shutil.which("wget"):
        return {"shardcast": "absent: it needs wget"}
    for old in folder.glob("client-*"):
        shutil.rmtree(old)
    try:
        took_s, done = theirs(machines, folder, payload, limit_s)
    except SystemExit as error:  # there is no environment for it
        return {"shardcast": f"absent: {error}"}
    return {
        "shardcast": SHARDCAST, "shardcast_time_to_all_s": took_s, "shardcast_clients_done": done,
        "shardcast_is_lower_bound": done < len(machines.clients),
        "shardcast_ratio_full": took_s / whole.time_s, "shardcast_ratio_delta": took_s / step.time_s,
    }  # fmt: skip


if __name__ == "__main__":
    main()
