"""Imports torch once and forks the roles that need it: each a real process, started in a moment, sharing the pages.

    stdin   {"name": "worker-1", "role": "worker", "config": "…/config.json", "url": "http://…", "attack": ""}
    stdout  {"event": "ready"}   {"event": "started", "name": …, "pid": …}   {"event": "ended", "name": …, "code": …}

When stdin closes, because the parent asked or died, every child is told to stop and then killed.
"""

import asyncio
import ctypes
import json
import os
import platform
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from farflung.config import load
from farflung.ops.logs import start_logging
from farflung.protocol.client import set_skew
from farflung.protocol.errors import FarflungError
from farflung.protocol.identity import Key
from farflung.tasks.keyring import root_of

POLL_S = 0.1
GRACE_S = 10.0
PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def main() -> None:
    """Serve until stdin closes."""
    import torch
    import transformers  # noqa: F401 - imported here so that no child has to

    import farflung.trainer
    import farflung.validator
    import farflung.worker  # noqa: F401 - likewise

    torch.set_num_threads(1)
    keep_freed_memory()
    children: dict[int, str] = {}
    _say(event="ready")
    buffer = b""
    while True:
        if select.select([0], [], [], POLL_S)[0]:
            chunk = os.read(0, 65536)
            if not chunk:
                break
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                order = json.loads(line)
                pid = _fork(order)
                children[pid] = order["name"]
                _say(event="started", name=order["name"], pid=pid)
        _reap(children)
    _end(children)


def _fork(order: dict[str, Any]) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _live(order)
    return pid


def _live(order: dict[str, Any]) -> NoReturn:
    """The child: its own log, its own role, and an exit code."""
    code = 1
    try:
        die_with_parent()
        config = load(Path(order["config"]))
        set_skew(order.get("skew_s", 0.0))
        _log_to(config.folder / "logs" / f"{order['name']}.log")
        start_logging()
        asyncio.run(_role(order, config))
        code = 0
    except FarflungError as error:
        sys.stderr.write(f"farflung: {error}\n")
        code = 2
    except KeyboardInterrupt:
        code = 130
    finally:
        import traceback

        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


async def _role(order: dict[str, Any], config: Any) -> None:
    from farflung.trainer import Trainer
    from farflung.validator import Validator

    name, url = order["name"], order["url"]
    folder = config.folder / "nodes" / name
    folder.mkdir(parents=True, exist_ok=True)
    root = root_of(config.folder / "keys")
    if order["role"] == "trainer":
        await Trainer(url, Key.load_or_make(config.folder / "keys" / "trainer"), config, root=root).run()
    elif order["role"] == "validator":
        key = Key.load_or_make(config.folder / "keys" / name)
        await Validator(url, key, folder, config.validator, run=config.run.name, root=root, name=name).run()
    else:
        await _worker(order, config, folder, root).run()


def _worker(order: dict[str, Any], config: Any, folder: Path, root: bytes) -> Any:
    """A worker, or an adversary that runs the attack of its order."""
    from farflung.ops.redteam import GALLERY
    from farflung.ops.redteam.base import Adversary
    from farflung.trust.record import TrustSettings
    from farflung.worker import Worker

    about = (order["url"], Key.load_or_make(folder / "key"), folder, config.worker)
    options = {"run": config.run.name, "root": root, "name": order["name"]}
    if not order["attack"]:
        return Worker(*about, **options)
    settings = config.trust.model_dump()
    trust = TrustSettings(**{name: settings[name] for name in TrustSettings.__struct_fields__})
    return Adversary(*about, attack=GALLERY[order["attack"]](), trust=trust, **options)


def die_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent dies; elsewhere closing stdin has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next tensor, instead of mapping and zeroing the same pages anew.

    A training step of a 135M model faulted in 400,000 pages: 5.1 CPU-seconds, 4.1 without, for 6.3 GiB instead of 5.1.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in ((M_TRIM_THRESHOLD, -1), (M_MMAP_MAX, 0), (M_ARENA_MAX, 1)):
            libc.mallopt(parameter, value)


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def _reap(children: dict[int, str]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        _say(event="ended", name=children.pop(pid), pid=pid, code=os.waitstatus_to_exitcode(status))


def _end(children: dict[int, str]) -> None:
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + GRACE_S
    while children and time.monotonic() < until:
        _reap(children)
        time.sleep(POLL_S)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _say(**event: Any) -> None:
    try:
        os.write(1, json.dumps(event).encode() + b"\n")
    except BrokenPipeError:
        return  # the parent is gone; stdin says so too


if __name__ == "__main__":
    main()
