"""Imports once and forks the roles that need it: each a real process, started in a moment, sharing the pages.

There are two, for what runs beside the database never has torch in its memory: `torch` and `light`.

    stdin   {"name": "worker-1", "role": "worker", "config": "…/config.json", "url": "http://…", "attack": ""}
    stdout  {"event": "ready"}   {"event": "started", "name": …, "pid": …}   {"event": "ended", "name": …, "code": …}

When stdin closes, because the parent asked or died, every child is told to stop and then killed.
"""

import asyncio
import ctypes
import gc
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from farflung.config import Config, load
from farflung.launch import role_makers
from farflung.launch.logs import start_logging
from farflung.launch.restarts import REFUSED
from farflung.net.client import set_skew
from farflung.protocol.errors import ConfigError, FarflungError
from farflung.protocol.shown import one_line

POLL_S = 0.05
GRACE_S = 10.0
PR_SET_PDEATHSIG = 1
LIGHT = ("coordinator", "scorer", "relay")
"""Roles of the forkserver that has no torch."""


def main() -> None:
    """Serve until stdin closes; the arguments say which roles, and of what base model."""
    try:
        {"light": _import_light, "torch": _import_torch}[sys.argv[1]](sys.argv[2])
    except ConfigError as error:
        sys.exit(f"farflung: {one_line(str(error))}")
    gc.freeze()  # or the first collection in a child would touch, and so copy, every page
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
                command = json.loads(line)
                pid = _fork(command)
                children[pid] = command["name"]
                _say(event="started", name=command["name"], pid=pid)
        _reap(children)
    _end(children)


def _import_light(_: str) -> None:
    """Spare each child the imports: a coordinator takes 1.5 CPU-seconds to import, and a tenth to open its run."""
    import alembic.command  # noqa: F401 - for the children, as all that follows

    import farflung.launch.coordinators
    import farflung.relay
    import farflung.scorer
    import farflung.tasks.keyring  # noqa: F401


def _import_torch(model: str) -> None:
    """All that roles with a model import, its own classes too: it is loaded once, and refused if its parts misfit."""
    import torch
    import transformers.utils.logging

    import farflung.tasks.keyring
    import farflung.trainer
    import farflung.validator
    import farflung.worker  # noqa: F401
    from farflung.engine.cpu.malloc import keep_freed_memory
    from farflung.learner.pretrained import check_pretrained

    torch.set_num_threads(1)
    keep_freed_memory()
    transformers.utils.logging.disable_progress_bar()  # its thread would be there at the fork
    check_pretrained(model)


def _fork(command: dict[str, Any]) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _live(command)
    return pid


def _live(command: dict[str, Any]) -> NoReturn:
    """The child: its own log, its own role, and an exit code."""
    code = 1
    try:
        die_with_parent()
        config = config_of(command)
        set_skew(command.get("skew_s", 0.0))
        _log_to(config.folder / "logs" / f"{command['name']}.log")
        start_logging()
        _be(command, config)
        code = 0
    except FarflungError as error:
        sys.stderr.write(f"farflung: {one_line(str(error))}\n")
        code = REFUSED if isinstance(error, ConfigError) else 2
    except KeyboardInterrupt:
        code = 130
    finally:
        import traceback

        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


def config_of(command: dict[str, Any]) -> Config:
    """The settings of an order: those of the environment are in them already, where no flag goes before it."""
    return load(Path(command["config"]), environ={})


def _be(command: dict[str, Any], config: Config) -> None:
    """Be the role of an order until it ends."""
    if command["role"] == "coordinator":
        from farflung.launch.coordinators import serve_all

        serve_all(config)
    else:
        role_makers.folder_of(config, command["name"]).mkdir(parents=True, exist_ok=True)
        asyncio.run(_made(command, config).run())


def _made(command: dict[str, Any], config: Config) -> Any:
    url, name = command["url"], command["name"]
    match command["role"]:
        case "trainer":
            return role_makers.trainer(url, config)
        case "worker":
            return role_makers.worker(url, config, name, command["attack"])
        case role:
            return {"validator": role_makers.validator, "scorer": role_makers.scorer, "relay": role_makers.relay}[role](
                url, config, name
            )


def die_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent dies; elsewhere closing stdin has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


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
