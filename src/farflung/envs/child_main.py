"""The scorer's child process: an environment behind lines of JSON, under limits (`python -m farflung.envs.child_main`).

    → {"op": "open", "env": "sums", "args": {}}
    ← {"version": "1", "spec": {…}, "network": "none" | "shared", "error": null}
    → {"op": "tasks", "split": "train", "limit": 2}
    ← {"task": {…}, "prompt": "…"}, the same again, {"end": true, "count": 2}
    → {"op": "score", "task": {…}, "transcript": "…"}
    ← {"reward": 1.0, "parts": {…}, "answer": "…", "error": null}

Whatever goes wrong in the environment is answered as {"error": "…"}; the next line is served as if nothing had been.
"""

import argparse
import ctypes
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO

from farflung.envs.base import Env, Score, Split, Task
from farflung.envs.load import load_env

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
FILE_BYTES = 16 * 2**20
PROCESSES = 64
MAX_REQUEST_BYTES = 8 * 2**20
MAX_TEXT_CHARS = 1_000
"""Longest answer or error text in a reply."""

Reply = dict[str, Any]


class Session:
    """One environment and what may be asked of it."""

    def __init__(self, network: str) -> None:
        self.network = network
        self.env: Env | None = None

    def answer(self, request: dict[str, Any]) -> Iterator[Reply]:
        """Yield the replies to one request."""
        asked = {"open": self.open, "tasks": self.tasks, "score": self.score}
        yield from asked[request.pop("op")](**request)

    def open(self, env: str, args: dict[str, Any]) -> Iterator[Reply]:
        """Load the environment."""
        self.env = load_env(env, args)
        yield {"version": str(self.env.version), "spec": self.env.spec, "network": self.network, "error": None}

    def tasks(self, split: Split, limit: int) -> Iterator[Reply]:
        """List the first tasks of a split with their prompts."""
        count = 0
        for task in islice(self.opened.tasks(split), limit):
            prompt = self.opened.prompt(task)
            check_text(task, prompt, f"task {count + 1} of the split {split}")
            yield {"task": task, "prompt": prompt}
            count += 1
        yield {"end": True, "count": count}

    def score(self, task: dict[str, Any], transcript: str) -> Iterator[Reply]:
        """Judge one transcript."""
        yield {**checked(self.opened.score(task, transcript)), "error": None}

    @property
    def opened(self) -> Env:
        """The environment; an error before `open`."""
        if self.env is None:
            raise ValueError("no environment is open; send the op open first")
        return self.env


def check_text(task: Task, prompt: object, place: str) -> None:
    """Raise ValueError for half of a surrogate pair, which no line can carry."""
    for name, value in {**task, "its prompt": prompt}.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise ValueError(f"{place} has half a character, {half}, in {name}; write the whole one") from error


def checked(score: Score) -> Reply:
    """The score as a reply; ValueError if it is not one that a reward could be."""
    if not isinstance(score, Score):
        raise ValueError(f"score() returned {type(score).__name__}; return a farflung.envs.base.Score")
    reward, parts = float(score.reward), {str(name): float(value) for name, value in score.parts.items()}
    if not 0 <= reward <= 1:
        raise ValueError(f"score() gave reward {reward}; a reward lies in [0, 1]")
    if not all(math.isfinite(value) for value in parts.values()):
        raise ValueError(f"score() gave parts {parts}; every part is a finite number")
    return {"reward": reward, "parts": parts, "answer": shown(score.answer)}


def shown(text: object) -> str:
    """Text for people: short, and free of half characters that could not be stored."""
    return str(text)[:MAX_TEXT_CHARS].encode("utf-8", "replace").decode()


def serve(requests: BinaryIO, replies: BinaryIO, session: Session, cpu_s: int) -> None:
    """Answer line by line until the parent closes the pipe."""
    while line := requests.readline(MAX_REQUEST_BYTES):
        allow_cpu(cpu_s)
        try:
            for reply in session.answer(json.loads(line)):
                write(replies, reply)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - an environment's fault is data, not the scorer's end
            write(replies, {"error": shown(f"{type(error).__name__}: {error}")})


def write(replies: BinaryIO, reply: Reply) -> None:
    """Send one line, encoded whole before its first byte is sent; NaN and half a character are no JSON, and refused."""
    replies.write(json.dumps(reply, allow_nan=False, ensure_ascii=False).encode() + b"\n")
    replies.flush()


def private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the protocol's ends off descriptors 0 and 1, so that what the environment prints or reads cannot hurt it."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return requests, replies


def leave_network() -> str:
    """Enter a network namespace without interfaces where the kernel lets us: "none", else "shared"."""
    uid, gid = os.getuid(), os.getgid()
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
            return "shared"
    except (OSError, AttributeError):  # no such call on this system
        return "shared"
    for name, text in {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}.items():
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError as error:
            print(f"event=scorer.ids_unmapped file={name} error={error}", file=sys.stderr)
    return "none"


def limit_resources(memory_bytes: int, network: str) -> None:
    """Bound memory, files and core dumps; processes only in a user namespace of our own, where none but ours count."""
    lower(resource.RLIMIT_AS, memory_bytes)
    lower(resource.RLIMIT_FSIZE, FILE_BYTES)
    lower(resource.RLIMIT_CORE, 0)
    if network == "none":
        lower(resource.RLIMIT_NPROC, PROCESSES)


def lower(limit: int, ceiling: int) -> None:
    """Set soft and hard limit to `ceiling`, or leave a hard one that is lower already."""
    hard = resource.getrlimit(limit)[1]
    ceiling = ceiling if hard == resource.RLIM_INFINITY else min(ceiling, hard)
    resource.setrlimit(limit, (ceiling, ceiling))


def allow_cpu(cpu_s: int) -> None:
    """Allow so many more CPU-seconds, so that a child whose parent died in mid-request does not spin for ever."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    ceiling = math.ceil(time.process_time()) + cpu_s
    soft = ceiling if hard == resource.RLIM_INFINITY else min(ceiling, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def main() -> None:
    """Take the limits on, then serve the pipes."""
    parser = argparse.ArgumentParser(description="Score transcripts: JSON lines in, JSON lines out.")
    parser.add_argument("--memory-bytes", type=int, default=2 * 2**30, help="address space (default 2 GiB)")
    parser.add_argument("--cpu-s", type=int, default=120, help="CPU-seconds for one request (default 120)")
    options = parser.parse_args()
    requests, replies = private_pipes()
    network = leave_network()
    limit_resources(options.memory_bytes, network)
    serve(requests, replies, Session(network), options.cpu_s)


if __name__ == "__main__":
    main()
