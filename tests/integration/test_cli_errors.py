"""What a user can get wrong ends in one clear sentence and exit code 2."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "examples" / "demo.toml")


def farflung(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "farflung", *arguments], capture_output=True, text=True, timeout=60, check=False
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


def test_an_older_run_is_not_overwritten(tmp_path):
    (tmp_path / "demo").mkdir()
    done = farflung("run", DEMO, "--run.dir", str(tmp_path))
    assert_one_sentence(done, "--resume", "--fresh")


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
