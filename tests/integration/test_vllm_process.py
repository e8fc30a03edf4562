"""A vLLM server of a node's own is started, watched, started again and ended, however the node ends."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

pytest.importorskip("torch")
import torch

from farflung.config import WorkerSection
from farflung.engine import vllm_process
from farflung.engine.base import Request
from farflung.engine.vllm_process import (
    READY,
    ManagedVllmEngine,
    ServerSize,
    VllmProcess,
    arguments,
    environment,
)
from farflung.ops import engine_install
from farflung.protocol.errors import ConfigError, EngineAway
from farflung.protocol.identity import Key
from farflung.worker import Worker

TESTS = Path(__file__).parents[1]
SIZE = ServerSize(torch.device("cpu"), 60, 4, 1 << 20, 0.0, 2)
VOCAB = 32


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """What `farflung engine install` leaves, but that the server is a stand-in."""
    found = tmp_path / "engine"
    (found / "bin").mkdir(parents=True)
    (found / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    python = found / "bin" / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nPYTHONPATH={TESTS} exec {sys.executable} {TESTS}/vllm_main.py "$@"\n')
    python.chmod(0o755)
    (found / READY).touch()
    return found


@pytest.fixture
def config(tiny_qwen) -> bytes:
    return tiny_qwen().config.to_json_string().encode()


@pytest.fixture
def process(home: Path, config: bytes, tmp_path: Path) -> Iterator[VllmProcess]:
    found = VllmProcess(home, tmp_path / "node", config, SIZE)
    yield found
    found.stop()


def is_there(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=2.0).status_code == 200
    except httpx2.TransportError:
        return False


def is_gone_within(url: str, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while is_there(url) and time.monotonic() < until:
        time.sleep(0.1)
    return not is_there(url)


def test_an_engine_has_a_server_of_its_own_and_ends_it(
    process: VllmProcess, home: Path, tiny_qwen, tmp_path: Path
) -> None:
    engine = ManagedVllmEngine(process, tmp_path / "node", eos_ids=[1], vocab=VOCAB)
    weights = {k: v.bfloat16() for k, v in tiny_qwen().state_dict().items() if k != "lm_head.weight"}
    asked = [Request((3, 4, 5), seed, 1.0, 6) for seed in range(4)]
    engine.load(weights.items())
    first = engine.generate(asked)
    assert all(first)
    assert (home / "lib/python3.11/site-packages/farflung/engine/vllm_noise.py").exists(), "the processor is beside it"

    children = psutil.Process().children(recursive=True)
    served = [one for one in children if "vllm_main.py" in " ".join(one.cmdline())]
    os.kill(served[0].pid, signal.SIGKILL)
    with pytest.raises(EngineAway):
        engine.generate(asked)
    engine.load(weights.items())
    assert process.starts == 2
    assert [one.ids for one in engine.generate(asked)] == [one.ids for one in first]
    engine.close()
    assert is_gone_within(process.url, 10)


def test_a_server_goes_with_a_node_that_is_killed(home: Path, config: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(config)
    script = textwrap.dedent(f"""
        import os, signal, torch
        from pathlib import Path
        from farflung.engine.vllm_process import ServerSize, VllmProcess
        size = ServerSize(torch.device("cpu"), 60, 4, 1 << 20, 0.0, 2)
        process = VllmProcess(Path({str(home)!r}), Path("node"), Path("config.json").read_bytes(), size)
        process.ensure()
        print(process.url, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert is_gone_within(done.stdout.strip(), 20)


def test_a_server_that_does_not_start_is_told_with_its_last_words(process: VllmProcess, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_VLLM_FAILS", "1")
    with pytest.raises(ConfigError, match=r"CUDA out of memory, or so \(all of it in .*server.log\)"):
        process.ensure()


def test_a_server_that_hangs_is_given_up_and_ended(process: VllmProcess, home: Path, monkeypatch) -> None:
    (home / "bin" / "python").write_text("#!/bin/sh\nsleep 600\n")
    monkeypatch.setattr(vllm_process, "START_S", 1.0)
    with pytest.raises(ConfigError, match="did not start within 1 s"):
        process.ensure()
    assert not [one for one in psutil.Process().children(recursive=True) if one.name() == "sleep"]


def test_without_an_installation_the_way_to_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="farflung engine install vllm"):
        VllmProcess(tmp_path / "none", tmp_path / "node", b"{}", SIZE)


def test_a_server_is_for_this_machine_alone_and_sized(monkeypatch) -> None:
    found = arguments(Path("/m"), 7, SIZE)
    assert found[found.index("--host") + 1] == "127.0.0.1"
    assert found[found.index("--max-model-len") + 1] == "64"
    assert found[found.index("--max-num-seqs") + 1] == "4"
    assert "--trust-remote-code" not in found
    assert environment(SIZE)["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment(SIZE)["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    on_third = ServerSize(torch.device("cuda", 1), 60, 4, 1 << 20, 0.0, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert environment(on_third)["CUDA_VISIBLE_DEVICES"] == "5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert environment(on_third)["CUDA_VISIBLE_DEVICES"] == "1"


def test_an_installation_that_fails_is_told_with_pips_last_words_and_counts_as_none(
    tmp_path: Path, monkeypatch, capfd
) -> None:
    monkeypatch.setattr(engine_install, "PINS", {"cpu": (str(tmp_path / "nothing"),), "else": ()})
    monkeypatch.setattr(engine_install, "best", lambda: "cpu")
    with pytest.raises(ConfigError, match=r"pip install .*ended with 1: .*nothing"):
        engine_install.install(tmp_path / "engine")
    assert "$ " in capfd.readouterr().err, "it tells what it does"
    with pytest.raises(ConfigError, match="farflung engine install vllm"):
        vllm_process.refuse_missing(tmp_path / "engine")


def test_a_worker_without_an_installation_ends_before_it_joins(tmp_path: Path) -> None:
    settings = WorkerSection(engine="vllm", engine_home=str(tmp_path / "none"))
    worker = Worker("http://127.0.0.1:1", Key.make(), tmp_path, settings)
    with pytest.raises(ConfigError, match="farflung engine install vllm"):
        asyncio.run(worker.open())
