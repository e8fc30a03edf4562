"""Commands of a machine's owner: when it may work for others, and the service that lends it."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import CycloptsError, Parameter

from farflung.cli.app import HOME, JOIN, Flags, app, expanded
from farflung.config import IdleSection
from farflung.protocol.errors import ConfigError


@Parameter(name="*")
@dataclass(frozen=True)
class Lending:
    """When a machine works, beside what `farflung idle` keeps.

    Parameters
    ----------
    when_idle
        Work only while the owner does not need the machine; `farflung idle` shows what that means.
    lasting
        Leave after so long, such as 3h, 90m or 1d12h.
    until
        Leave when the clock shows this next, such as 07:00.
    hours
        Hours to work in, in local time, such as "mon-fri 19:00-07:00, sat-sun".
    share
        Share of the time that it computes, from 0 to 1.
    """

    when_idle: bool = False
    lasting: Annotated[str, Parameter(name="--for")] = ""
    until: str = ""
    hours: str = ""
    share: float | None = None

    def settings(self) -> IdleSection:
        """What was said. Raises ConfigError."""
        from farflung.ops.preferences import given

        return given(**vars(self), now_s=time.time())


UNSAID = Lending()


@app.command(group=JOIN)
def idle(action: Literal["show", "set"] = "show", *settings: str, folder: Path = HOME) -> None:
    """Show or set when this machine may work for others: `farflung idle set user_idle_s=300 programs=steam`.

    Parameters
    ----------
    action
        What to do.
    settings
        Each as key=value; key= goes back to the default.
    folder
        Where the node keeps its key and its owner's preferences.
    """
    from farflung.ops.preferences import edit, show

    if action == "show" and settings:
        raise ConfigError(f"`farflung idle show` takes no settings such as {settings[0]!r}; use `farflung idle set`")
    found = expanded(folder)
    sys.stdout.write((edit(found, settings) if action == "set" else show(found)) + "\n")


@app.command(group=JOIN)
def service(
    action: Literal["install", "status", "remove"], address: str = "", *flags: Flags, folder: Path = HOME
) -> None:
    """Write, show or remove a service of this user that joins with --when-idle; nothing is started.

    Parameters
    ----------
    action
        What to do; `install` writes a systemd user unit, or a launchd agent on a Mac.
    address
        Of the run, as the operator gives it.
    flags
        Options of `farflung join`, which it then always gets.
    folder
        Where this node keeps its key, weights and preferences.
    """
    from farflung.ops import service as services
    from farflung.ops.join import parse

    if action == "install":
        parse(address)
        _refuse_wrong(address, flags)
        told = services.install(address, expanded(folder), flags)
    elif address or flags:
        raise ConfigError(f"`farflung service {action}` takes no address; there is one service for each user")
    else:
        told = services.status() if action == "status" else services.remove()
    sys.stdout.write(told + "\n")


def _refuse_wrong(address: str, flags: tuple[str, ...]) -> None:
    """Raise ConfigError for options that `farflung join` would refuse only at the next login."""
    try:
        app.parse_args(["join", address, *flags], exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise ConfigError(f"`farflung join` refuses {' '.join(flags)!r}: {error}") from error
