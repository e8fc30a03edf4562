"""Folders of runs and nodes: whose they are, which are free, and what is never lost."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.conftest import settings

from farflung.config import Config, save
from farflung.launch.run_folder import prepare, why_disk_full
from farflung.net.session import ending_signals
from farflung.protocol.errors import ConfigError
from farflung.store import owner
from farflung.store.db import migrate

OWN = """
import sys, time
from pathlib import Path
from farflung.store import owner
owner.own(Path(sys.argv[1]), sys.argv[2], is_shared=sys.argv[3] == "shared")
print("has it", flush=True)
time.sleep(60)
"""


class Other:
    """Another process that owns a folder."""

    def __init__(self, folder: Path, part: str = "", how: str = "alone") -> None:
        command = [sys.executable, "-c", OWN, str(folder), part, how]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "has it\n"

    def __enter__(self) -> "Other":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return settings(tmp_path, coordinator={"grants": {}})


def found(config: Config, name: str = "") -> None:
    """As a start leaves it that went as far as founding the run, or another one."""
    prepare(config)
    save(config, config.folder / "config.json")
    migrate(config.database_url)
    with sqlite3.connect(config.folder / "farflung.db") as database:
        columns = [(row[1], row[2]) for row in database.execute("PRAGMA table_info(runs)")]
        known = {"run": name or config.run.name, "status": "running"}
        values = [known.get(column, 0 if kind == "FLOAT" else "") for column, kind in columns]
        database.execute(f"INSERT INTO runs VALUES ({','.join('?' * len(values))})", values)
    database.close()


# --- owners ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"fresh": True}, {"resume": True}], ids=["plain", "fresh", "resume"])
def test_the_folder_of_a_live_run_is_refused_and_stays_as_it_is(config: Config, flags) -> None:
    config.folder.mkdir(parents=True)
    save(config, config.folder / "config.json")
    with Other(config.folder) as other:
        before = sorted(path.name for path in config.folder.iterdir())
        with pytest.raises(ConfigError) as caught:
            prepare(config, **flags)
        assert sorted(path.name for path in config.folder.iterdir()) == before
    assert f"{config.folder} is in use by `farflung " in str(caught.value)
    assert f"(process {other.process.pid} on " in str(caught.value)


def test_a_part_has_one_owner_and_the_whole_has_none_beside_it(tmp_path: Path) -> None:
    with Other(tmp_path, "", "shared"), Other(tmp_path, "validator-1"):
        owner.own(tmp_path, "validator-2")
        owner.own(tmp_path, "validator-2")
        with pytest.raises(ConfigError, match=r"validator-1 in .* is in use by"):
            owner.own(tmp_path, "validator-1")
        with pytest.raises(ConfigError, match="is in use by"):
            owner.own(tmp_path)


def test_a_dead_owner_is_none_but_what_it_left_running_is_waited_for(tmp_path: Path) -> None:
    """As a run that is killed leaves its roles for a moment, which hold its lock with it."""
    script = f"import sys; sys.argv[1:] = [{str(tmp_path)!r}, '', 'alone']\n" + OWN.replace(
        "time.sleep(60)",
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '60'], pass_fds=owner.held(Path(sys.argv[1])), stdout=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\ntime.sleep(60)",
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    left = int([process.stdout.readline(), process.stdout.readline()][1])
    process.kill()
    process.communicate()
    killing = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill {left}"])
    since = time.monotonic()
    owner.own(tmp_path)
    assert time.monotonic() - since < owner.REMAINS_S
    assert killing.wait() == 0


@pytest.mark.parametrize("said", [b"", b"{", b"[]", b"\xff\xfe", b'{"pid": "x"}'])
def test_an_owner_that_cannot_be_read_is_still_one(tmp_path: Path, said: bytes) -> None:
    with Other(tmp_path):
        (tmp_path / owner.NAME).write_bytes(said)
        with pytest.raises(ConfigError, match="is in use by"):
            owner.own(tmp_path)


# --- which folders are free ------------------------------------------------------------------------------------------


def test_a_founded_run_is_gone_on_with_or_thrown_away_by_name_alone(config: Config) -> None:
    found(config)
    with pytest.raises(ConfigError, match="exists already; use --resume to go on, --fresh to throw it away"):
        prepare(config)
    prepare(config, resume=True)
    assert (config.folder / "farflung.db").exists()
    prepare(config, fresh=True)
    assert sorted(path.name for path in config.folder.iterdir()) == ["keys", "logs", owner.NAME]


@pytest.mark.parametrize("left", ["nothing", "a start", "another run"])
def test_a_folder_in_which_no_run_was_founded_is_free(config: Config, left: str) -> None:
    config.folder.mkdir(parents=True)
    if left != "nothing":
        prepare(config)
        (config.folder / "keys" / "root").write_text("mine")
        (config.folder / "metrics.jsonl").write_text('{"kind": "start", "at": 1}\n')
        save(config, config.folder / "config.json")
    if left == "another run":
        found(config, "other")
    with pytest.raises(ConfigError, match="holds no run to resume"):
        prepare(config, resume=True)
    prepare(config)
    assert left == "nothing" or (config.folder / "keys" / "root").read_text() == "mine"
    assert not (config.folder / "metrics.jsonl").exists()


def test_checkpoints_without_their_database_are_not_trained_over(config: Config) -> None:
    prepare(config)
    save(config, config.folder / "config.json")
    (config.folder / "checkpoints" / "step-000003").mkdir(parents=True)
    for flags in ({}, {"resume": True}):
        with pytest.raises(ConfigError, match=r"holds checkpoints, but .* `farflung restore`"):
            prepare(config, **flags)
    prepare(config, fresh=True)
    assert not (config.folder / "checkpoints").exists()


def test_a_damaged_database_is_named_with_a_way_out_and_can_be_thrown_away(config: Config) -> None:
    found(config)
    (config.folder / "farflung.db").write_bytes(b"no database" * 999)
    for flags in ({}, {"resume": True}):
        with pytest.raises(ConfigError, match=r"farflung\.db is damaged \(.*\); bring a backup back"):
            prepare(config, **flags)
    prepare(config, fresh=True)
    assert not (config.folder / "farflung.db").exists()


def test_a_link_leads_to_the_folder_and_stays_when_it_is_emptied(config: Config, tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    config.folder.parent.mkdir(parents=True, exist_ok=True)
    config.folder.symlink_to(place)
    found(config)
    (place / "checkpoints").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").touch()
    prepare(config, fresh=True)
    assert config.folder.is_symlink()
    assert sorted(path.name for path in place.iterdir()) == ["keys", "logs", owner.NAME]
    assert (tmp_path / "kept" / "a").exists(), "a link in it is removed, not followed"


@pytest.mark.parametrize("flags", [{}, {"fresh": True}])
def test_what_is_no_folder_is_refused(config: Config, flags) -> None:
    config.folder.parent.mkdir(parents=True, exist_ok=True)
    config.folder.write_text("mine")
    with pytest.raises(ConfigError, match="is no folder"):
        prepare(config, **flags)
    config.folder.unlink()
    config.folder.symlink_to("/nowhere/at/all")
    with pytest.raises(ConfigError, match="is a link to /nowhere/at/all, which does not exist"):
        prepare(config, **flags)


@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_fresh_deletes_no_folder_that_is_somebody_elses(config: Config, name: str) -> None:
    """A folder of notes, or of a model: its config.json is not ours."""
    config.folder.mkdir(parents=True)
    (config.folder / name).write_text('{"architectures": ["Qwen2ForCausalLM"]}')
    (config.folder / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"holds no run, but .* --fresh would delete"):
        prepare(config, fresh=True)
    assert (config.folder / name).exists()
    assert (config.folder / "model.safetensors").exists()


def test_a_run_that_another_database_holds_keeps_its_folder(config: Config, tmp_path: Path) -> None:
    found(config)
    outside = tmp_path / "outside.db"
    (config.folder / "farflung.db").rename(outside)
    coordinator = config.coordinator.model_copy(update={"database": f"sqlite:///{outside}"})
    (config.folder / "keys" / "root").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds run 'test' already"):
        prepare(config.model_copy(update={"coordinator": coordinator}), fresh=True)
    assert (config.folder / "keys" / "root").exists()


def test_a_disk_with_little_room_is_told(tmp_path: Path, monkeypatch) -> None:
    assert why_disk_full(tmp_path) == ""
    monkeypatch.setattr("farflung.launch.run_folder.LOW_BYTES", 1 << 62)
    assert f"are left on the disk of {tmp_path}" in why_disk_full(tmp_path)
    assert why_disk_full(tmp_path / "gone") == ""


# --- commands --------------------------------------------------------------------------------------------------------


def test_a_second_worker_in_one_folder_is_refused(tmp_path: Path) -> None:
    with Other(tmp_path):
        command = [sys.executable, "-m", "farflung", "worker", "http://127.0.0.1:9", "--folder", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "is in use by" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_terminal_ends_a_process_in_good_order_unless_nohup_says_no() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        assert signal.SIGHUP in ending_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert signal.SIGHUP not in ending_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_printed_to_a_terminal_that_was_closed_goes_nowhere() -> None:
    """The screen of a run whose terminal was closed: it would fail, and take the end of the run along."""
    script = (
        "import signal, sys; from farflung.launch.terminal import let_go_of_lost\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); print('ready', flush=True)\n"
        "sys.stdin.read(1)\nlet_go_of_lost(); print('more', flush=True); sys.exit(7)"
    )
    leader, follower = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=follower, stderr=follower
    ) as one:
        said = b""
        while not said.endswith(b"\n"):
            said += os.read(leader, 1)
        time.sleep(0.1)
        os.close(follower)
        os.close(leader)
        one.communicate(b"x", timeout=60)
    assert one.returncode == 7
