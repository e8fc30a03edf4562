"""`farflung service`: a systemd user unit or a launchd agent that lends this machine; written, not started."""

import contextlib
import os
import plistlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from farflung.protocol.errors import ConfigError

MARK = "Written by `farflung service install`, which overwrites it; `farflung service remove` takes it away."
LABEL = "farflung.join"
PATIENCE_S = 20.0
UNIT = """# {mark}
[Unit]
Description=farflung: this machine works for a run while its owner does not need it

[Service]
Type=exec
ExecStart={command}
Nice=10
IOSchedulingClass=idle
KillMode=mixed
TimeoutStopSec=60
Restart=on-failure
RestartSec=60

[Install]
WantedBy=default.target
"""


def path_of_service(platform: str = sys.platform) -> Path:
    """Where this user's services are. Raises ConfigError where none of the two kinds is."""
    if platform == "darwin":
        return Path.home() / "Library" / "LaunchAgents" / f"{LABEL}.plist"
    if platform.startswith("linux"):
        config = os.environ.get("XDG_CONFIG_HOME", "")
        return (Path(config) if config.startswith("/") else Path.home() / ".config") / "systemd/user/farflung.service"
    raise ConfigError(f"there is no service for {platform}; start `farflung join ADDRESS --when-idle` at login")


def command(address: str, folder: Path, flags: Sequence[str]) -> list[str]:
    """The command that the service runs."""
    join = [sys.executable, "-m", "farflung", "join", address, "--when-idle", "--folder", str(folder.resolve())]
    return [*join, *flags]


def unit(words: Sequence[str]) -> str:
    """The systemd unit."""
    return UNIT.format(mark=MARK, command=" ".join(map(quoted, words)))


def quoted(word: str) -> str:
    """A word as systemd reads it back: nothing in it is a variable, a specifier or an escape. Raises ConfigError."""
    if not word.isprintable():
        raise ConfigError(f"{word!r} has a character that no unit file can hold; choose another --folder or name")
    for sign, written in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        word = word.replace(sign, written)
    return f'"{word}"'


def agent(words: Sequence[str]) -> str:
    """The launchd agent, disabled until its owner enables it."""
    fields = {
        "Label": LABEL,
        "ProgramArguments": list(words),
        "Disabled": True,
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "Nice": 10,
        "LowPriorityIO": True,
        "ProcessType": "Background",
        "ExitTimeOut": 60,
    }
    head, line, rest = plistlib.dumps(fields).decode().partition("\n")
    return f"{head}{line}<!-- {MARK} -->\n{rest}"


def install(address: str, folder: Path, flags: Sequence[str], platform: str = sys.platform) -> str:
    """Write the service, for this user alone to read, as a flag may be a token. Raises ConfigError."""
    path = path_of_service(platform)
    _refuse_foreign(path)
    words = command(address, folder, flags)
    text = agent(words) if platform == "darwin" else unit(words)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)
    return f"wrote {path}:\n\n{text}\nNothing was started. To start it now and at every login:\n{_start(platform)}"


def status(platform: str = sys.platform) -> str:
    """Whether it is there, and what the system says of it."""
    path = path_of_service(platform)
    if not path.exists():
        return f"{path} is not there; `farflung service install ADDRESS` writes it"
    if not _is_own(path):
        return f"{path} is there, and was not written by farflung"
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    runs = next((line.removeprefix("ExecStart=") for line in lines if line.startswith("ExecStart=")), "")
    asked = ["launchctl", "print", _domain()] if platform == "darwin" else [*SYSTEMCTL, "is-active", path.name]
    code, said = _tell(asked)
    state = said.splitlines()[0] if said else f"{asked[0]} ended with {code}"
    return f"{path}{': ' if runs else ''}{runs}\n{state}"


def remove(platform: str = sys.platform) -> str:
    """Stop it where it runs, and take it away. Raises ConfigError for a file of another program."""
    path = path_of_service(platform)
    if not path.exists():
        return f"{path} is not there; nothing to remove"
    _refuse_foreign(path)
    asked = ["launchctl", "bootout", _domain()] if platform == "darwin" else [*SYSTEMCTL, "disable", "--now", path.name]
    code, said = _tell(asked)
    path.unlink()
    told = "" if code == 0 else f" ({' '.join(asked)} said: {said or code}; if a node still runs, stop it by hand)"
    return f"removed {path}{told}"


SYSTEMCTL = ("systemctl", "--user")


def _start(platform: str) -> str:
    if platform == "darwin":
        user = _domain().rpartition("/")[0]
        return f"  launchctl enable {_domain()}\n  launchctl bootstrap {user} '{path_of_service(platform)}'"
    return (
        f"  {' '.join(SYSTEMCTL)} daemon-reload\n  {' '.join(SYSTEMCTL)} enable --now farflung.service\n"
        "and to have it run while you are not logged in: loginctl enable-linger"
    )


def _domain() -> str:
    return f"gui/{os.getuid()}/{LABEL}"


def _refuse_foreign(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not _is_own(path)):
        raise ConfigError(f"{path} was not written by farflung; move it away first")


def _is_own(path: Path) -> bool:
    with contextlib.suppress(UnicodeDecodeError):
        return any(MARK in line for line in path.read_text(encoding="utf-8").splitlines()[:3])
    return False


def _tell(words: Sequence[str]) -> tuple[int, str]:
    """Exit code and words of a command of the system."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, (done.stdout + done.stderr).strip()
