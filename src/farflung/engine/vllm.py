"""vLLM as an engine that generates: a server of its own, in an environment of its own, on this machine, by its URL.

Tokens go in and come out; the noise is added inside by `farflung.engine.vllm_noise`. Weights go through a file: they
are written beside the node's own, and the server is told to read them. Every load has a label of its own, which the
server puts on each answer, so that one that was started again, and holds its first weights, is noticed at once.
"""

import asyncio
import contextlib
import json
import logging
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import torch
from safetensors import safe_open

from farflung.engine.arithmetic import BITS, Own
from farflung.engine.base import Completion, Replay, Request
from farflung.engine.loading import read_slices
from farflung.engine.seeded_rows import SEED, TEMPERATURE
from farflung.protocol.errors import ConfigError, EngineAway, Unreachable, WeightsError, WrongWeights
from farflung.protocol.probe import Slice
from farflung.protocol.stops import Stops

log = logging.getLogger(__name__)
_FILE = "model.safetensors"
_HEADER = 16 << 20
"""Bytes before the first value in a file of weights: some 100,000 names."""
_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_TIMEOUT_S = 600.0
"""For calls that load weights or ask for settings. A rollout takes as long as it takes: its lease has the deadline."""
_CONNECT_S = 10.0
_LOOK_S = 0.1
"""Seconds between two looks whether to stop."""
_COUNT_S = 5.0
"""Seconds between two looks at the number of tokens that the server has made."""
_COUNTED = re.compile(r"^vllm:generation_tokens_total(?:\{[^\n]*\})? (\d[\d.e+]*)", re.MULTILINE)
_HOW = (
    "start it as docs/run.md says: VLLM_SERVER_DEV_MODE=1, --tokens-only and "
    "--logits-processors farflung.engine.vllm_noise:SeededNoise"
)


class VllmEngine:
    """One policy in a vLLM server. It generates; to replay takes a verifier's own arithmetic, which this has not."""

    def __init__(
        self, url: str, folder: Path, *, eos_ids: Iterable[int], stops: Stops | None = None, max_rows: int = 64
    ) -> None:
        """Take a server that runs, and a folder that it can read. Raises Unreachable, or ConfigError for its settings.

        At most `max_rows` requests are under way at once; the server queues what is more than its --max-num-seqs.
        """
        self.url, self.eos_ids, self.max_rows = url.rstrip("/"), frozenset(eos_ids), max_rows
        self.stops, self._enders = stops, sorted(self.eos_ids.union(stops.at_once() if stops else ()))
        self._folder, self._label, self.made = folder.resolve(), "", 0
        self._folder.mkdir(parents=True, exist_ok=True)
        self._refuse_unseeded_server()

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights; no prefix that the server keeps outlives them. Raises WeightsError.

        Takes memory for one tensor, and disk for all. The server must be able to read the folder at the same path.
        """
        self._label = ""
        self._write(tensors)
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(self._folder)}}
        self._tell("/collective_rpc", call)
        if not self._tell("/reset_prefix_cache").json().get("success"):
            raise WeightsError(f"vLLM at {self.url} keeps prefixes of the weights before: is it serving others too?")
        label = secrets.token_hex(8)
        self._tell("/update_weight_version", {"new_version": label})
        self._label = label

    def values(self, slices: Sequence[Slice]) -> bytes:
        """These slices of the file that the server was last told to read, in bfloat16.

        vLLM fuses and packs matrices, so the published values are not to be had from its memory: this shows a missed
        fetch, and the label on every answer a missed load.
        """
        self._refuse_unloaded()
        with safe_open(self._folder / _FILE, "pt") as file:
            names = {part.name for part in slices} & set(file.keys())
            return read_slices({name: file.get_tensor(name) for name in names}, slices)

    def generate(
        self, requests: Sequence[Request], should_stop: Callable[[], bool] | None = None
    ) -> list[Completion | None]:
        """Generate every request, in order. Once `should_stop` says yes, requests under way are aborted and stay None.

        So do those that fail, unless all do: then raises EngineAway if the server does not answer, WrongWeights if it
        does not hold what was loaded. Raises ConfigError if it refuses, or cuts a completion short.
        """
        self._refuse_unloaded()
        return asyncio.run(self._generate(requests, should_stop))

    def replay(self, items: Sequence[tuple[Request, Sequence[int]]], *, alone: bool = False) -> list[Replay]:
        """Refused: replay is torch's. Raises ConfigError."""
        raise ConfigError("vLLM generates only; replay needs the local engine")

    async def _generate(
        self, requests: Sequence[Request], should_stop: Callable[[], bool] | None
    ) -> list[Completion | None]:
        limits = httpx2.Limits(max_connections=self.max_rows)
        timeout = httpx2.Timeout(None, connect=_CONNECT_S)
        async with httpx2.AsyncClient(base_url=self.url, limits=limits, timeout=timeout, trust_env=False) as client:
            tasks = [asyncio.create_task(self._complete(client, request)) for request in requests]
            counting = asyncio.create_task(self._count())
            try:
                await _until(tasks, should_stop)
            finally:
                for task in (*tasks, counting):
                    task.cancel()
                await asyncio.gather(*tasks, counting, return_exceptions=True)
            return _results(tasks)

    async def _count(self) -> None:
        """Follow how many tokens the server makes: a request under way says nothing before its end."""
        before: float | None = None
        async with httpx2.AsyncClient(base_url=self.url, timeout=_TIMEOUT_S, trust_env=False) as client:
            while True:
                with contextlib.suppress(httpx2.TransportError):  # the requests themselves tell that it is away
                    made = _tokens_made((await client.get("/metrics")).text)
                    self.made += max(0, int(made - (made if before is None else before)))
                    before = made
                await asyncio.sleep(_COUNT_S)

    async def _complete(self, client: httpx2.AsyncClient, request: Request) -> Completion:
        try:
            answer = await client.post("/inference/v1/generate", json=self._body(request))
        except httpx2.TransportError as error:
            raise EngineAway(f"vLLM at {self.url} does not answer: {error!r}") from error
        if answer.status_code >= 500:
            raise EngineAway(f"vLLM at {self.url} failed at a request ({answer.status_code}): {answer.text[:300]}")
        if answer.status_code != 200:
            raise ConfigError(f"vLLM at {self.url} refuses to generate ({answer.status_code}): {answer.text[:300]}")
        completion = self._completion(request, answer.json()["choices"][0])
        self.made += len(completion.ids)
        return completion

    def _body(self, request: Request) -> dict[str, Any]:
        seeded = {SEED: request.seed & 0xFFFFFFFFFFFFFFFF, TEMPERATURE: request.temperature}
        sampling = {
            "temperature": 0,
            "max_tokens": request.max_new_tokens,
            "ignore_eos": True,
            "stop_token_ids": self._enders,
            "logprobs": 0,
            "detokenize": False,
            "extra_args": seeded if request.temperature > 0 else {},
        }
        return {"token_ids": list(request.prompt_ids), "sampling_params": sampling}

    def _completion(self, request: Request, choice: dict[str, Any]) -> Completion:
        ids, logp = tuple(choice["token_ids"]), tuple(token["logprob"] for token in choice["logprobs"]["content"])
        labels = {span["version"] for span in choice["weight_versions"] or ()}
        if labels != {self._label}:
            raise WrongWeights(f"vLLM at {self.url} generated with weights {sorted(labels)}, not {self._label}")
        if self.stops and (end := self.stops.end(ids)):  # one that lies across tokens: the server knows no text
            return Completion(ids[:end], logp[:end])
        if len(ids) < request.max_new_tokens and (not ids or ids[-1] not in self.eos_ids):
            raise ConfigError(
                f"vLLM at {self.url} stopped after {len(ids)} of {request.max_new_tokens} tokens "
                f"({choice['finish_reason']}); give it a longer --max-model-len"
            )
        return Completion(ids, logp)

    def _write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        part = self._folder / (_FILE + ".part")
        save_one_by_one(part, tensors)
        part.replace(self._folder / _FILE)

    def _tell(self, path: str, body: dict[str, Any] | None = None) -> httpx2.Response:
        try:
            answer = httpx2.post(self.url + path, json=body or {}, timeout=_TIMEOUT_S)
        except httpx2.TransportError as error:
            raise EngineAway(f"vLLM at {self.url} does not answer: {error!r}") from error
        if answer.status_code != 200:
            raise WeightsError(f"vLLM at {self.url} answers {path} with {answer.status_code}: {answer.text[:300]}")
        return answer

    def _refuse_unseeded_server(self) -> None:
        """With the noise, a server refuses a nonsensical seed; without dev mode, it knows no labels."""
        nonsense = {"token_ids": [0], "sampling_params": {"max_tokens": 1, "temperature": 0, "extra_args": {SEED: ""}}}
        try:
            seeded = httpx2.post(f"{self.url}/inference/v1/generate", json=nonsense, timeout=_TIMEOUT_S)
            labels = httpx2.get(f"{self.url}/weight_info", timeout=_TIMEOUT_S)
            counts = httpx2.get(f"{self.url}/metrics", timeout=_TIMEOUT_S).text
        except httpx2.TransportError as error:
            raise Unreachable(f"no vLLM answers at {self.url} ({error!r}); {_HOW}") from error
        if seeded.status_code != 400 or SEED not in seeded.text:
            raise ConfigError(f"vLLM at {self.url} adds no seeded noise (it answered {seeded.status_code}); {_HOW}")
        if labels.status_code != 200:
            raise ConfigError(f"vLLM at {self.url} lets nobody load weights; {_HOW}")
        if not _COUNTED.search(counts):
            log.warning("vLLM at %s does not count its tokens, so a long answer may outlast its lease", self.url)

    def _refuse_unloaded(self) -> None:
        if not self._label:
            raise WeightsError("the engine holds no complete weights; load all tensors of one step first")


def save_one_by_one(path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """A safetensors file of tensors that are never in memory together. Raises WeightsError for one that comes twice.

    The header comes first and is known last: room is left for it, and filled with blanks, as the format has it.
    """
    header: dict[str, Any] = {}
    with path.open("wb") as file:
        file.seek(_HEADER)
        for name, tensor in tensors:
            if name in header:
                raise WeightsError(f"tensor {name} came twice")
            start = file.tell() - _HEADER
            file.write(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy())
            offsets = [start, file.tell() - _HEADER]
            header[name] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps(header).encode()
        if len(text) > _HEADER - 8:
            raise WeightsError(f"the names of {len(header):,} tensors take {len(text):,} bytes; {_HEADER - 8:,} work")
        file.seek(0)
        file.write((_HEADER - 8).to_bytes(8, "little") + text.ljust(_HEADER - 8))


def _tokens_made(metrics: str) -> float:
    """Over all of its engines, since the server started."""
    return sum(float(value) for value in _COUNTED.findall(metrics))


def server_numerics(url: str) -> Own:
    """What a server says of its numerics; nothing of what it leaves out. Raises Unreachable."""
    try:
        answer = httpx2.get(f"{url.rstrip('/')}/server_info", params={"config_format": "json"}, timeout=_TIMEOUT_S)
    except httpx2.TransportError as error:
        raise Unreachable(f"no vLLM answers at {url} ({error!r}); {_HOW}") from error
    found = answer.json() if answer.status_code == 200 else {}
    return Own("vllm", _at(found, "device_config", "device_type"), *_arithmetic(found))


def _arithmetic(found: Any) -> tuple[str, int]:
    """Arithmetic and bits of a weight by a server's settings; unknown for ways to quantise that have no name here."""
    dtype = _at(found, "model_config", "dtype").removeprefix("torch.")
    quantised, cached = _at(found, "model_config", "quantization"), _at(found, "cache_config", "cache_dtype")
    if quantised and not quantised.startswith("fp8"):
        return "", 0
    if quantised or cached.startswith("fp8"):
        return "fp8", BITS["fp8" if quantised else "bfloat16"]
    return (dtype, BITS[dtype]) if dtype in BITS else ("", 0)


def _at(found: Any, section: str, name: str) -> str:
    """One of a server's settings, empty where it says none."""
    for key in ("vllm_config", section, name):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else ""


async def _until(tasks: Sequence[asyncio.Task[Completion]], should_stop: Callable[[], bool] | None) -> None:
    """Wait until all are done, one shows that the settings are wrong, or `should_stop` says so."""
    left: Iterable[asyncio.Task[Completion]] = tasks
    while left and not (should_stop is not None and should_stop()):
        done, left = await asyncio.wait(left, timeout=_LOOK_S)
        for task in done:
            if not isinstance(task.exception(), EngineAway | WrongWeights):
                task.result()


def _results(tasks: Sequence[asyncio.Task[Completion]]) -> list[Completion | None]:
    """The completions; a request that failed costs itself alone, unless none came to anything."""
    failed = [error for task in tasks if not task.cancelled() and (error := task.exception())]
    found = [None if task.cancelled() or task.exception() else task.result() for task in tasks]
    if failed and not any(found):
        raise failed[0]
    if failed:
        log.warning("%d of %d requests failed because=%s", len(failed), len(tasks), failed[0])
    return found
