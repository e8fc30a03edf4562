"""As much of a vLLM server as the engine speaks to; a real model computes, as slowly as a test says."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from farflung.engine.local import LocalEngine
from farflung.engine.seeded_rows import SEED
from vllm_sampler import Flaws, Sampler, told

LOOK_S = 0.005


class StandIn(ThreadingHTTPServer):
    """A server at `url`. Its flaws and its slowness are attributes, which a test sets."""

    request_queue_size = 128
    daemon_threads = False  # one that computes while the interpreter ends would abort it; closing waits for all

    def __init__(self, engine: LocalEngine, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.engine, self.lock = engine, threading.Lock()
        self.sampler = Sampler(engine.model)
        self.label, self.is_developing, self.longest, self.delay_s = "default", True, 99, 0.0
        self.rollouts = 0
        """Requests that would have been rollouts: with end tokens, as no other is asked."""
        self.clock: Callable[[], float] = time.time
        self.rollout_s = 0.0
        """How long a rollout takes by that clock; it counts a token whenever that moves on."""
        self.made, self.finished, self.under_way, self.is_dead = 0, 0, 0, False
        """Tokens and rollouts that it counts, and whether it hangs up on everybody, in the middle of a rollout too."""
        self.seats = threading.Semaphore(1 << 20)
        """Rollouts that it makes at once; the others wait, and are under way too."""
        self.begun, self.idle_moments = 0, 0
        """Rollouts that were asked for, and how often the last one under way ended."""
        self.stuck: set[int] = set()
        """Numbers of rollouts, as they are asked for, that do not end while they are here."""
        self.breaks: set[tuple[int, ...]] = set()
        """Prompts at which it answers with an error."""
        self.settings: Any = None
        """What it says of its numerics, if anything."""
        self.hangs_up_after: int | None = None
        """Answers until it closes every connection instead."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def flaws(self) -> Flaws:
        return self.sampler.flaws

    def start_again(self) -> None:
        """As a server that was killed comes back: with its first weights."""
        self.is_dead, self.label = False, "default"

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if self.is_dead:
            return 0, {}
        if path != "/inference/v1/generate" and not self.is_developing:
            return 404, {"detail": "Not Found"}
        match path:
            case "/inference/v1/generate":
                return self._generate(body["token_ids"], body["sampling_params"], body.get("cache_salt"))
            case "/collective_rpc" if body["method"] == "update_config":
                return 200, {"results": [None]}
            case "/collective_rpc":
                folder = Path(body["kwargs"]["weights_path"])
                if not self.flaws.keeps_weights:
                    self.engine.load(load_file(folder / "model.safetensors").items())
                return 200, {"results": [None]}
            case "/reset_prefix_cache":
                self.sampler.reset()
                return 200, {"success": True}
            case "/server_info?config_format=json":
                return (200, {"vllm_config": self.settings}) if self.settings is not None else (404, {})
            case "/update_weight_version":
                self.label = body["new_version"]
            case "/metrics":
                return 200, f'vllm:generation_tokens_total{{engine="0",model_name="m"}} {float(self.made)}\n'
        return 200, {"weight_version": self.label}

    def _take_time(self) -> None:
        with self.lock:
            number, self.begun = self.begun, self.begun + 1
            self.under_way += 1
        with self.seats:
            began = before = self.clock()
            while (self.clock() < began + self.rollout_s or number in self.stuck) and not self.is_dead:
                time.sleep(LOOK_S)
                now = self.clock()
                self.made += now > before
                before = now
        with self.lock:
            self.under_way -= 1
            self.idle_moments += not self.under_way
            self.finished += not self.is_dead

    def _generate(self, prompt: list[int], sampling: dict[str, Any], salt: str | None) -> tuple[int, Any]:
        seed = (sampling.get("extra_args") or {}).get(SEED, 0)
        if self.sampler.has_processor and not isinstance(seed, int):
            return 400, {"error": {"message": f"{SEED} is nonsense"}}
        is_rollout = bool(sampling.get("stop_token_ids"))
        if is_rollout:
            time.sleep(self.delay_s)
            self._take_time()
        if self.is_dead:
            return 0, {}
        if tuple(prompt) in self.breaks:
            return 500, {"error": "out of memory"}
        sampling["max_tokens"] = min(sampling["max_tokens"], self.longest) if is_rollout else sampling["max_tokens"]
        with self.lock:
            if is_rollout and self.hangs_up_after is not None:
                self.hangs_up_after -= 1
            if (self.hangs_up_after or 0) < 0:
                return 0, {}
            if is_rollout:
                self.rollouts += 1
                self.engine.eos_ids = frozenset(sampling["stop_token_ids"])
            return 200, self._answer(prompt, sampling, salt)

    def _answer(self, prompt: list[int], sampling: dict[str, Any], salt: str | None) -> dict[str, Any]:
        said = self.sampler.generate(prompt, sampling, salt)
        content = [told(token, logp_V, sampling.get("logprobs") or 0) for token, logp_V in said]
        spans = [{"version": self.label, "start": 0, "end": len(said)}]
        choice = {"token_ids": [token for token, _ in said], "logprobs": {"content": content}}
        choice |= {"weight_versions": spans, "finish_reason": "length"}
        if not (count := sampling.get("prompt_logprobs")):
            return {"choices": [choice]}
        logp_TV = self.sampler.read(prompt)
        read = [told(token, logp_V, count)["top_logprobs"] for token, logp_V in zip(prompt[1:], logp_TV, strict=False)]
        seen = [{str(one["token_id"]): {"logprob": one["logprob"], "rank": one["rank"]} for one in p} for p in read]
        return {"choices": [choice], "prompt_logprobs": [None, *seen]}


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        size = int(self.headers["content-length"])
        self._say(*self.server.answer(self.path, json.loads(self.rfile.read(size))))

    def do_GET(self) -> None:
        self._say(*self.server.answer(self.path, {}))

    def _say(self, status: int, body: Any) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        if not status:
            self.close_connection = True
            return
        with contextlib.suppress(BrokenPipeError):  # who stops does not wait for an answer
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def vllm_server(engine: LocalEngine) -> Iterator[StandIn]:
    """One that runs."""
    stand_in = StandIn(engine)
    thread = threading.Thread(target=stand_in.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield stand_in
    finally:
        stand_in.is_dead = True
        stand_in.shutdown()
        thread.join()
        stand_in.server_close()
