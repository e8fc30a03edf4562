"""What a user can get wrong ends in one clear sentence and exit code 2."""

import asyncio
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import settings

from farflung.cli.app import HOME, expanded
from farflung.config import save
from farflung.launch.summary import summarise
from farflung.launch.view import desk_of, run_in
from farflung.net.client import Client
from farflung.net.session import Index
from farflung.ops.join import parse
from farflung.protocol.errors import ConfigError, Unreachable
from farflung.protocol.identity import Key
from farflung.store.db import migrate

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "examples" / "demo.toml")


def farflung(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "farflung", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | environ,
    )


def assert_one_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_misspelt_key_in_a_file_names_the_nearest(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("[learn]\nlearning_rate = 1e-4\n[run]\nstep = 3\n")
    assert_one_sentence(farflung("run", str(config)), "run.step", "run.steps", str(config))


def test_misspelt_flag_names_the_nearest(tmp_path):
    done = farflung("run", DEMO, "--run.dir", str(tmp_path), "--learn.group", "8")
    assert_one_sentence(done, "learn.group", "learn.groups")


def test_a_value_out_of_bounds_says_which(tmp_path):
    done = farflung("run", DEMO, "--run.dir", str(tmp_path), "--run.steps", "0")
    assert_one_sentence(done, "run.steps", "0")


def test_missing_model_path(tmp_path):
    done = farflung("run", DEMO, "--run.dir", str(tmp_path), "--model.path", str(tmp_path / "nowhere"))
    assert_one_sentence(done, "nowhere", "model")


def test_a_model_that_cannot_work_leaves_no_run_behind(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(ROOT / "examples" / "base", model)
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
    done = farflung("run", DEMO, "--run.dir", str(tmp_path / "runs"), "--model.path", str(model))
    assert_one_sentence(done, "git-lfs pointer", "git lfs pull", str(model))
    assert not (tmp_path / "runs").exists()


def test_busy_port(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = farflung("run", DEMO, "--run.dir", str(tmp_path), "--coordinator.port", port)
    assert_one_sentence(done, port, "Address already in use", "choose another port")


def test_an_older_run_is_not_overwritten(found_run):
    done = farflung("run", DEMO, "--run.dir", str(found_run), "--run.name", "test")
    assert_one_sentence(done, "--resume", "--fresh")


def test_other_locales_read_and_write_utf8(tmp_path):
    """A comment in UTF-8 where the machine speaks ASCII, and a sentence that quotes what that cannot say."""
    config = tmp_path / "run.toml"
    config.write_text("# Grüße\n[env]\nlength_prompt = 'Größe'\nlengths = [3]\n", encoding="utf-8")
    done = farflung("run", str(config), LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert_one_sentence(done, r"length_prompt 'Gr\xf6\xdfe' must hold")


def test_a_home_is_looked_for_when_it_is_asked_for():
    """As in a container under a user that no list has: only `join` and `doctor` without --folder need one."""
    assert Path("~/.farflung") == HOME
    with pytest.raises(ConfigError, match=r"there is no home folder .* name a folder with --folder"):
        expanded(Path("~nobody-of-that-name/.farflung"))


@pytest.mark.parametrize("command", [summarise, lambda folder: desk_of(run_in(folder))], ids=["summary", "view"])
def test_a_database_that_is_none_is_named_with_a_way_out(tmp_path, command):
    folder = tmp_path / "test"
    folder.mkdir()
    save(settings(tmp_path), folder / "config.json")
    with pytest.raises(ConfigError, match=r"there is no database .*farflung\.db; was this run ever started"):
        command(folder)
    (folder / "farflung.db").write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match=r"farflung\.db is damaged .*; bring a backup back with `farflung restore`"):
        command(folder)


@pytest.mark.parametrize(
    ("revision", "words"),
    [
        ("9999_future", "a later version .*9999_future.* pip install -U"),
        ("0001", "an earlier version .*in another folder"),
    ],
)
def test_a_database_of_another_version_is_named_with_a_way_out(tmp_path, revision: str, words: str):
    url = f"sqlite:///{tmp_path / 'farflung.db'}"
    migrate(url)
    with sqlite3.connect(tmp_path / "farflung.db") as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    database.close()
    with pytest.raises(ConfigError, match=rf"farflung\.db was made by {words}"):
        migrate(url)


def test_loopback_goes_through_no_proxy(monkeypatch):
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")

        async def ask() -> None:
            client = Client("http://127.0.0.1:9", Key.make(), patience_s=0.0)
            try:
                await client.get("/v1", Index)
            finally:
                await client.close()

        with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9 does not answer"):
            asyncio.run(ask())
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


@pytest.mark.parametrize("address", ["http://[::1", "http://[::1]:99999", "http://::1:8000:9", "ftp://x", "http://"])
def test_an_address_that_is_none_is_told(address):
    with pytest.raises(ConfigError, match="is no address"):
        parse(address)
    assert parse("http://[::1]:8000") == ("http://[::1]:8000", None)


def test_a_worker_without_a_coordinator(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    done = farflung("worker", url, "--folder", str(tmp_path), "--patience-s", "0")
    assert_one_sentence(done, url, "does not answer")


def test_too_old_worker_is_told_to_upgrade(tmp_path):
    """A coordinator that asks for a later protocol, and a worker of today."""
    command = [sys.executable, "-m", "farflung", "coordinator", DEMO, "--run.dir", str(tmp_path)]
    settings = ["--coordinator.minimum_version", "99", "--coordinator.grants", f'{{"{"0" * 64}": "trainer"}}']
    with subprocess.Popen([*command, *settings], stderr=subprocess.PIPE, text=True) as coordinator:
        assert coordinator.stderr is not None
        line = next(line for line in coordinator.stderr if "listening url=" in line)
        url = line.split("url=")[1].split()[0]
        done = farflung("worker", url, "--folder", str(tmp_path / "w"))
        coordinator.terminate()
    assert_one_sentence(done, "upgrade", "99")
