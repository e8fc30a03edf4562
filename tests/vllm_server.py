"""As much of a vLLM server as the engine speaks to; a local engine computes, as slowly as a test's clock says."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from farflung.engine.base import Request
from farflung.engine.local import LocalEngine
from farflung.engine.seeded_rows import SEED, TEMPERATURE

LOOK_S = 0.005


class StandIn(ThreadingHTTPServer):
    """A server at `url`. Its flaws and its slowness are attributes, which a test sets."""

    daemon_threads = False  # one that computes while the interpreter ends would abort it; closing waits for all

    def __init__(self, engine: LocalEngine) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.engine, self.lock = engine, threading.Lock()
        self.label, self.is_seeded, self.is_developing, self.longest, self.delay_s = "default", True, True, 99, 0.0
        self.clock: Callable[[], float] = time.time
        self.rollout_s = 0.0
        """How long a rollout takes by that clock; it counts a token whenever that moves on."""
        self.made, self.finished, self.under_way, self.is_dead = 0, 0, 0, False
        """Tokens and rollouts that it counts, and whether it hangs up on everybody, in the middle of a rollout too."""
        self.breaks: set[tuple[int, ...]] = set()
        """Prompts at which it answers with an error."""
        self.settings: Any = None
        """What it says of its numerics, if anything."""
        self.hangs_up_after: int | None = None
        """Answers until it closes every connection instead."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

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
                return self._generate(body["token_ids"], body["sampling_params"])
            case "/collective_rpc":
                folder = Path(body["kwargs"]["weights_path"])
                self.engine.load(load_file(folder / "model.safetensors").items())
                return 200, {"results": [None]}
            case "/reset_prefix_cache":
                return 200, {"success": True}
            case "/server_info?config_format=json":
                return (200, {"vllm_config": self.settings}) if self.settings is not None else (404, {})
            case "/update_weight_version":
                self.label = body["new_version"]
            case "/metrics":
                return 200, f'vllm:generation_tokens_total{{engine="0",model_name="m"}} {float(self.made)}\n'
        return 200, {"weight_version": self.label}

    def _take_time(self) -> None:
        began = before = self.clock()
        with self.lock:
            self.under_way += 1
        while self.clock() < began + self.rollout_s and not self.is_dead:
            time.sleep(LOOK_S)
            now = self.clock()
            self.made += now > before
            before = now
        with self.lock:
            self.under_way -= 1
            self.finished += not self.is_dead

    def _generate(self, prompt: list[int], sampling: dict[str, Any]) -> tuple[int, Any]:
        seeded = sampling["extra_args"]
        if self.is_seeded and not isinstance(seeded.get(SEED, 0), int):
            return 400, {"error": {"message": f"{SEED} is nonsense"}}
        if not isinstance(seeded.get(SEED, 0), int):
            seeded = {}
        time.sleep(self.delay_s)
        self._take_time()
        if self.is_dead:
            return 0, {}
        if tuple(prompt) in self.breaks:
            return 500, {"error": "out of memory"}
        max_new_tokens = min(sampling["max_tokens"], self.longest)
        request = Request(tuple(prompt), seeded.get(SEED, 0), seeded.get(TEMPERATURE, 0.0), max_new_tokens)
        with self.lock:
            if self.hangs_up_after is not None:
                self.hangs_up_after -= 1
            if (self.hangs_up_after or 0) < 0:
                return 0, {}
            self.engine.eos_ids = frozenset(sampling.get("stop_token_ids", ()))
            [said] = self.engine.generate([request])
        assert said is not None
        logp = {"content": [{"logprob": value} for value in said.logp]}
        spans = [{"version": self.label, "start": 0, "end": len(said.ids)}]
        choice = {"token_ids": said.ids, "logprobs": logp, "weight_versions": spans, "finish_reason": "length"}
        return 200, {"choices": [choice]}


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
