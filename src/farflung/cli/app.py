"""The parts that all commands share: the application and its groups, the settings, how a command ends."""

import asyncio
import contextlib
import errno
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, NoReturn

from cyclopts import App, Group, Parameter

from farflung.config import Config, load
from farflung.engine.cpu.malloc import keep_freed_memory
from farflung.launch.logs import start_logging
from farflung.protocol.errors import ConfigError, FarflungError
from farflung.protocol.shown import one_line

app = App(
    name="farflung",
    help="""Reinforcement learning on far-flung machines that nobody has to trust.

Three commands to begin with: `farflung run examples/demo.toml` trains a small model on this machine, `farflung join
ADDRESS` lends this machine to a run, `farflung view FOLDER` shows a run that is over. `farflung COMMAND --help` has the
options of a command.""",
)
RUN = Group("Run", sort_key=1)
JOIN = Group("Join", sort_key=2)
LOOK = Group("Look", sort_key=3)
SAFE = Group("Keep safe", sort_key=4)
BREAK = Group("Try to break", sort_key=5)
ROLES = Group("Roles", sort_key=6)
app["--help"].group = app["--version"].group = Group("Options", sort_key=7)

HOME = Path("~/.farflung")
WAYS_OUT = {
    errno.ENOSPC: "; make room on that disk, or name another folder",
    errno.EDQUOT: "; make room on that disk, or name another folder",
    errno.EFBIG: "; files may not grow so large here, see `ulimit -f`",
    errno.EROFS: "; name a folder that can be written to",
    errno.EACCES: "; name a folder or file that this user may use",
    errno.EPERM: "; name a folder or file that this user may use",
    errno.EMFILE: "; raise the limit of open files, see `ulimit -n`",
}
Flags = Annotated[str, Parameter(allow_leading_hyphen=True, help="Settings as --section.key value.")]
Address = Annotated[str, Parameter(help="The coordinator's address.")]
Url = Annotated[str, Parameter(help="The coordinator's address; without it, as written in the run's folder.")]
RunFile = Annotated[Path, Parameter(help="The run's TOML file, the same as the coordinator's.")]
RunConfig = Annotated[Path, Parameter(help="The run's TOML file, or the config.json in its folder.")]
RunFolder = Annotated[Path, Parameter(help="The run's folder, such as runs/demo.")]
WhichRun = Annotated[str, Parameter(help="Which run, if the coordinator has several.")]
Json = Annotated[bool, Parameter(help="Log as JSON.")]


def complain(error: FarflungError | OSError) -> int:
    """Say in one sentence what went wrong, where anybody still reads it; gives the exit code."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"farflung: {one_line(_refusal(error) if isinstance(error, OSError) else str(error))}\n")
    return 2


def _refusal(error: OSError) -> str:
    """The machine's refusal, and the way out."""
    what = f"{error.filename}: " if error.filename else ""
    return f"{what}{error.strerror or error}{WAYS_OUT.get(error.errno or 0, '')}"


def expanded(folder: Path) -> Path:
    """A folder with `~` as the home folder. Raises ConfigError where there is none."""
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"there is no home folder for {folder}: HOME is not set, and user {os.getuid()} is in no list; name a "
            "folder with --folder"
        ) from error


def end_with(main: Coroutine[Any, Any, str]) -> NoReturn:
    """Print the outcome and end at once: the blob store's threads may not outlive the interpreter (it aborts)."""
    try:
        sys.stdout.write(asyncio.run(main) + "\n")
        code = 0
    except FarflungError as error:
        code = complain(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start_computing(json: bool) -> None:
    """Begin as every role with a model does: logs, and freed memory kept."""
    start_logging(json)
    keep_freed_memory()


def parts_of(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def settings_of(config: Path, flags: tuple[str, ...]) -> Config:
    """The settings of a run; this process and those that it starts trust the authority named there."""
    from farflung.net.client import CA_VARIABLE

    settings = load(config, flags)
    if settings.coordinator.tls_ca:
        os.environ[CA_VARIABLE] = str(Path(settings.coordinator.tls_ca).resolve())
    return settings


def url_of(url: str, config: Config) -> str:
    """The coordinator's address: given, or as the coordinator of the same folder wrote it."""
    if url:
        return url
    path = config.folder / "coordinator.url"
    if not path.exists():
        raise ConfigError(f"{path} is missing: start the coordinator first, or say --url http://host:port")
    return path.read_text().strip()
