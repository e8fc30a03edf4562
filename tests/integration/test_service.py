"""`farflung service`: what is written is what systemd and launchd read, and a file of another program stays."""

import os
import plistlib
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from farflung.ops import service
from farflung.protocol.errors import ConfigError

FLAGS = ("--invite", 'a "b" %h $HOME \\n', "--threads", "4")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a user with blanks and signs in the path."""
    found = tmp_path / "a b%n$"
    found.mkdir()
    monkeypatch.setenv("HOME", str(found))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nowhere")  # no service manager of ours is asked
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return found


def farflung(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "farflung", *words], capture_output=True, text=True, check=False)


def test_a_unit_is_written_shown_and_removed(home: Path) -> None:
    told = farflung("service", "install", "https://host:7000", *FLAGS)
    assert told.returncode == 0, told.stderr
    path = home / ".config/systemd/user/farflung.service"
    text = path.read_text()
    assert str(path) in told.stdout
    assert text in told.stdout
    assert "Nothing was started" in told.stdout
    for line in ("Nice=10", "IOSchedulingClass=idle", "KillMode=mixed", "TimeoutStopSec=60", "WantedBy=default.target"):
        assert line in text.splitlines()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600, "an invitation is in it"
    assert farflung("service", "install", "https://host:7001").returncode == 0, "its own it overwrites"
    assert "https://host:7001" in farflung("service", "status").stdout
    assert str(path) in farflung("service", "remove").stdout
    assert not path.exists()
    assert "is not there" in farflung("service", "status").stdout


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong_with_it(home: Path) -> None:
    service.install("https://host:7000", home / "node", FLAGS, "linux")
    path = service.path_of_service("linux")
    words = ["systemd-analyze", "verify", "--user", str(path)]
    environment = os.environ | {"XDG_RUNTIME_DIR": str(home)}
    told = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert (told.returncode, told.stdout + told.stderr) == (0, "")


def unquoted(command: str) -> list[str]:
    """As systemd reads words (systemd.service(5), "Command lines"): quotes, then specifiers and variables."""
    words, word, rest, is_within = list[str](), "", iter(command), False
    for sign in rest:
        if sign == '"':
            is_within = not is_within
        elif sign == " " and not is_within:
            words.append(word)
            word = ""
        else:
            word += next(rest) if sign in "\\%$" else sign
    return [*words, word]


def test_every_word_is_read_back_as_it_was(home: Path) -> None:
    words = service.command("https://host:7000", home / "node", FLAGS)
    line = next(line for line in service.unit(words).splitlines() if line.startswith("ExecStart="))
    assert unquoted(line.removeprefix("ExecStart=")) == words
    assert words[-4:] == list(FLAGS)
    with pytest.raises(ConfigError, match="no unit file can hold"):
        service.unit([*words, "a\nExecStartPre=/bin/evil"])


def test_an_agent_is_a_plist_that_starts_only_when_its_owner_enables_it(home: Path) -> None:
    told = service.install("https://host:7000", home / "node", FLAGS, "darwin")
    path = home / "Library/LaunchAgents/farflung.join.plist"
    found = plistlib.loads(path.read_bytes())
    assert found["ProgramArguments"] == service.command("https://host:7000", home / "node", FLAGS)
    assert (found["Nice"], found["LowPriorityIO"], found["ExitTimeOut"], found["Disabled"]) == (10, True, 60, True)
    assert found["KeepAlive"] == {"SuccessfulExit": False}
    assert "launchctl enable" in told
    service.install("https://host:7001", home / "node", (), "darwin")
    service.remove("darwin")
    assert not path.exists()


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_file_of_another_program_is_neither_overwritten_nor_removed(home: Path, platform: str) -> None:
    path = service.path_of_service(platform)
    path.parent.mkdir(parents=True)
    path.write_text("[Service]\nExecStart=/bin/true\n")
    for act in (lambda: service.install("h:1", home, (), platform), lambda: service.remove(platform)):
        with pytest.raises(ConfigError, match="was not written by farflung"):
            act()
    assert "was not written by farflung" in service.status(platform)
    assert path.read_text() == "[Service]\nExecStart=/bin/true\n"
    path.rename(home / "elsewhere")
    path.symlink_to(home / "elsewhere")
    with pytest.raises(ConfigError, match="was not written by farflung"):
        service.install("h:1", home, (), platform)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("install",), "is no address"),
        (("install", "https://host:7000", "--thread", "4"), "--thread"),
        (("install", "https://host:7000", "--share", "much"), "much"),
        (("status", "https://host:7000"), "takes no address"),
    ],
)
def test_what_join_would_refuse_is_refused_at_once(home: Path, words: tuple[str, ...], said: str) -> None:
    told = farflung("service", *words)
    assert told.returncode == 2
    assert said in told.stderr
    assert not (home / ".config").exists()


def test_other_systems_are_told_what_to_do() -> None:
    with pytest.raises(ConfigError, match="at login"):
        service.path_of_service("win32")
