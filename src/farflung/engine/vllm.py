"""vLLM as an engine that generates: a server of its own, in an environment of its own, on this machine, by its URL.

Tokens go in and come out. The run's noise is what a stock server makes of a request's seed; one whose own is another
adds it by `farflung.engine.vllm_noise`. Which it is shows in what it sends: after each load it is tried
(`sampling_check.py`) before it gets a rollout. Weights go through a file: they are written beside the node's own, and
the server is told to read them. Every load has a label of its own, which the server puts on each answer, so that one
that was started again, and holds its first weights, is noticed at once.
"""

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import torch
from safetensors import safe_open

from farflung.engine import sampling_check
from farflung.engine.base import Completion, Replay, Request, unloaded
from farflung.engine.loading import read_slices
from farflung.engine.sampling_check import TOP
from farflung.engine.seeded_rows import SEED, TEMPERATURE
from farflung.engine.vllm_answers import (
    COUNTED,
    HOW,
    TIMEOUT_S,
    number,
    only_choice,
    places,
    prompt_places,
    replay_of,
    server_settings,
    tokens_made,
)
from farflung.protocol.errors import ConfigError, EngineAway, Unreachable, WeightsError, WrongWeights
from farflung.protocol.probe import Slice
from farflung.protocol.stops import Stops

log = logging.getLogger(__name__)
_FILE = "model.safetensors"
_HEADER = 16 << 20
"""Bytes before the first value in a file of weights: some 100,000 names."""
_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_CONNECT_S = 10.0
_LOOK_S = 0.1
"""Seconds between two looks whether to stop."""
_COUNT_S = 5.0
"""Seconds between two looks at the number of tokens that the server has made."""
_PLAIN = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": True,
    "detokenize": False,
}
"""What a server would else take from the model's generation_config.json, or from settings of its own."""
_BLOCK = 16
"""Positions that a server keeps together, where it does not say."""


class VllmEngine:
    """One policy in a vLLM server. It generates; to replay takes a verifier's own arithmetic, which this has not."""

    def __init__(
        self,
        url: str,
        folder: Path,
        *,
        eos_ids: Iterable[int],
        vocab: int,
        stops: Stops | None = None,
        max_rows: int = 64,
    ) -> None:
        """Take a server that runs, and a folder that it can read. Raises Unreachable, or ConfigError for its settings.

        At most `max_rows` requests of one call are under way at once; the server queues what is more than its
        --max-num-seqs. Several threads may generate at once.
        """
        self.url, self.eos_ids, self.max_rows = url.rstrip("/"), frozenset(eos_ids), max_rows
        self.stops, self._enders = stops, sorted(self.eos_ids.union(stops.at_once() if stops else ()))
        self._folder, self._label, self.made, self._vocab = folder.resolve(), "", 0, vocab
        self._calls: list[list[asyncio.Task[Completion]]] = []
        self._folder.mkdir(parents=True, exist_ok=True)
        self._has_processor = self._asked_for_processor()
        self._settings, self._is_tried = server_settings(self.url), False
        self._refuse_useless_server()

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights, and see that the server samples as it should and keeps no prefix of those before.

        Raises WeightsError, or ConfigError for a server that does not. Takes memory for one tensor, and disk for all.
        The server must be able to read the folder at the same path.
        """
        self._label = ""
        self._write(tensors)
        self._answers([self._prefix()])  # with the weights of before
        self._tell("/pause?mode=keep")
        try:
            self._tell("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self._folder)}})
            if not self._tell("/reset_prefix_cache").json().get("success"):
                raise WeightsError(
                    f"vLLM at {self.url} keeps prefixes of the weights before: is it serving others too?"
                )
            label = secrets.token_hex(8)
            self._tell("/update_weight_version", {"new_version": label})
        finally:
            self._tell("/resume")
        self._refuse_wrong_sampling()
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

    @property
    def under_way(self) -> int:
        """Requests that were asked for and have no end yet, over all calls."""
        return sum(not task.done() for tasks in list(self._calls) for task in tasks)

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
        """The server's own view of texts, by the log-probabilities of its likeliest tokens: for a self-test.

        No proof: where a token that is not among them would win, it is missed; and the probability of a pick is that
        among them, at temperatures other than 1.
        """
        self._refuse_unloaded()
        bodies = [self._reading(request, ids) for request, ids in items]
        return [
            replay_of(request, prompt_places(answer, len(request.prompt_ids)))
            for (request, _), answer in zip(items, self._answers(bodies), strict=True)
        ]

    def close(self) -> None:
        """The server is not this node's own."""

    # --- trying the server -------------------------------------------------------------------------------------------

    def _refuse_wrong_sampling(self) -> None:
        """Raise ConfigError for a server that does not sample as the run asks, or has weights of before in its cache.

        All of it at the first load and after the server was away; at others the shorter part.
        """
        asked = sampling_check.texts(self._vocab, is_first=not self._is_tried)
        told = self._answers([*(self._probe(one, logprobs=TOP) for one in asked), *self._prefixes()])
        prefixes, texts = told[len(asked) :], told[: len(asked)]
        wrong = sampling_check.fault(list(zip(asked, map(places, texts), strict=True)), self._known_fault(texts))
        wrong = wrong or sampling_check.stale_prefixes(*map(places, prefixes))
        if not wrong and not self._is_tried:
            wrong = self._withheld()
        if wrong:
            raise ConfigError(f"vLLM at {self.url} {wrong}")
        self._is_tried = True

    def _withheld(self) -> str:
        asked = sampling_check.forced(self._vocab)
        told = self._answers(
            [
                *(self._probe(one.request) for one in asked),
                *(self._reading(one.request, [one.token]) for one in asked),
            ]
        )
        sent = [only_choice(answer)["token_ids"][0] for answer in told[: len(asked)]]
        read = [
            prompt_places(answer, len(one.request.prompt_ids))[0]
            for one, answer in zip(asked, told[len(asked) :], strict=True)
        ]
        return sampling_check.withheld(asked, sent, read, self._vocab)

    def _known_fault(self, told: Sequence[dict[str, Any]]) -> str:
        """A fault that the server tells of itself, in its settings or its answers."""
        settings = self._settings if isinstance(self._settings, dict) else {}
        if settings.get("speculative_config") or any(
            (one.get("metrics") or {}).get("speculative_decoding") for one in told
        ):
            return "speculation"
        return "watermark" if settings.get("watermark_config") else ""

    def _prefix(self) -> dict[str, Any]:
        """A request whose prompt fills a block, which a server may keep."""
        block = number(self._settings, "cache_config", "block_size") or _BLOCK
        longest = number(self._settings, "model_config", "max_model_len") or 2 * block
        prompt = tuple((104729 * (k + 1)) % self._vocab for k in range(min(2 * block, longest - 1)))
        return self._probe(Request(prompt, 1, 1.0, 1), logprobs=TOP)

    def _prefixes(self) -> list[dict[str, Any]]:
        """That request under a name of its own, as it was asked before the load, and under another name."""
        one, other = ({"cache_salt": secrets.token_hex(8)} for _ in range(2))
        return [self._prefix() | one, self._prefix(), self._prefix() | other]

    def _answers(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers to a few short requests, all at once."""

        async def gather() -> list[dict[str, Any]]:
            limits = httpx2.Limits(max_connections=self.max_rows)
            async with httpx2.AsyncClient(
                base_url=self.url, limits=limits, timeout=TIMEOUT_S, trust_env=False
            ) as client:
                return await asyncio.gather(*(self._answer(client, body) for body in bodies))

        return asyncio.run(gather())

    def _reading(self, request: Request, ids: Sequence[int]) -> dict[str, Any]:
        """A request for the log-probabilities of a text that is there."""
        whole = Request((*request.prompt_ids, *ids), request.seed, request.temperature, 1)
        return self._probe(whole, prompt_logprobs=TOP)

    # --- generating --------------------------------------------------------------------------------------------------

    async def _generate(
        self, requests: Sequence[Request], should_stop: Callable[[], bool] | None
    ) -> list[Completion | None]:
        limits = httpx2.Limits(max_connections=self.max_rows)
        timeout = httpx2.Timeout(None, connect=_CONNECT_S)
        async with httpx2.AsyncClient(base_url=self.url, limits=limits, timeout=timeout, trust_env=False) as client:
            tasks = [asyncio.create_task(self._complete(client, request)) for request in requests]
            counting = asyncio.create_task(self._count())
            self._calls.append(tasks)
            try:
                await _until(tasks, should_stop)
            finally:
                self._calls.remove(tasks)
                for task in (*tasks, counting):
                    task.cancel()
                await asyncio.gather(*tasks, counting, return_exceptions=True)
            return _results(tasks)

    async def _count(self) -> None:
        """Follow how many tokens the server makes: a request under way says nothing before its end."""
        before: float | None = None
        async with httpx2.AsyncClient(base_url=self.url, timeout=TIMEOUT_S, trust_env=False) as client:
            while True:
                with contextlib.suppress(httpx2.TransportError):  # the requests themselves tell that it is away
                    made = tokens_made((await client.get("/metrics")).text)
                    self.made += max(0, int(made - (made if before is None else before)))
                    before = made
                await asyncio.sleep(_COUNT_S)

    async def _complete(self, client: httpx2.AsyncClient, request: Request) -> Completion:
        completion = self._completion(request, only_choice(await self._answer(client, self._body(request))))
        self.made += len(completion.ids)
        return completion

    async def _answer(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = await client.post("/inference/v1/generate", json=body)
        except httpx2.TransportError as error:
            self._is_tried = False
            raise EngineAway(f"vLLM at {self.url} does not answer: {error!r}") from error
        if answer.status_code >= 500:
            raise EngineAway(f"vLLM at {self.url} failed at a request ({answer.status_code}): {answer.text[:300]}")
        if answer.status_code != 200:
            raise ConfigError(f"vLLM at {self.url} refuses to generate ({answer.status_code}): {answer.text[:300]}")
        return answer.json()

    def _probe(self, request: Request, **more: int) -> dict[str, Any]:
        """A request that nothing ends before its time."""
        return self._body(request, stop_token_ids=[], **more)

    def _body(self, request: Request, **more: Any) -> dict[str, Any]:
        """A request with every parameter of sampling, so that none is the server's to choose."""
        is_seeded = request.temperature > 0
        sampling: dict[str, Any] = _PLAIN | {
            "temperature": request.temperature,
            "max_tokens": request.max_new_tokens,
            "stop_token_ids": self._enders,
            "logprobs": 0,
        }
        if is_seeded and self._has_processor:
            sampling |= {"temperature": 0, "extra_args": {SEED: request.seed, TEMPERATURE: request.temperature}}
        elif is_seeded:
            sampling["seed"] = request.seed
        return {"token_ids": list(request.prompt_ids), "sampling_params": sampling | more}

    def _completion(self, request: Request, choice: dict[str, Any]) -> Completion:
        ids, logp = tuple(choice["token_ids"]), tuple(token["logprob"] for token in choice["logprobs"]["content"])
        labels = {span["version"] for span in choice["weight_versions"] or ()}
        if labels != {self._label}:
            self._is_tried = False
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
            answer = httpx2.post(self.url + path, json=body or {}, timeout=TIMEOUT_S)
        except httpx2.TransportError as error:
            raise EngineAway(f"vLLM at {self.url} does not answer: {error!r}") from error
        if answer.status_code != 200:
            raise WeightsError(f"vLLM at {self.url} answers {path} with {answer.status_code}: {answer.text[:300]}")
        return answer

    def _asked_for_processor(self) -> bool:
        """Whether the server has the logits processor of this package: that refuses a nonsensical seed."""
        nonsense = {"token_ids": [0], "sampling_params": {"max_tokens": 1, "temperature": 0, "extra_args": {SEED: ""}}}
        try:
            answer = httpx2.post(f"{self.url}/inference/v1/generate", json=nonsense, timeout=TIMEOUT_S)
        except httpx2.TransportError as error:
            raise Unreachable(f"no vLLM answers at {self.url} ({error!r}); {HOW}") from error
        if answer.status_code == 400 and SEED in answer.text:
            return True
        if answer.status_code == 200:
            return False
        raise ConfigError(f"vLLM at {self.url} takes no token ids ({answer.status_code}: {answer.text[:200]}); {HOW}")

    def _refuse_useless_server(self) -> None:
        """Without dev mode it knows no labels and lets nobody load."""
        try:
            labels = httpx2.get(f"{self.url}/weight_info", timeout=TIMEOUT_S)
            counts = httpx2.get(f"{self.url}/metrics", timeout=TIMEOUT_S).text
        except httpx2.TransportError as error:
            raise Unreachable(f"no vLLM answers at {self.url} ({error!r}); {HOW}") from error
        if labels.status_code != 200:
            raise ConfigError(f"vLLM at {self.url} lets nobody load weights; {HOW}")
        if not COUNTED.search(counts):
            log.warning("vLLM at %s does not count its tokens, so a long answer may outlast its lease", self.url)

    def _refuse_unloaded(self) -> None:
        if not self._label:
            raise unloaded()


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
