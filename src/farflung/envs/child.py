"""The parent's side of a scorer: start a child, ask it, replace it after any fault. Nothing it says is trusted.

A child is one process group of its own. Its environment holds no secret, each of its lines is bounded and so is the
time for each answer; what breaks a bound raises ScoreFault, and the next call starts another child.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any, Self, TypeVar

import msgspec

from farflung.envs.base import Score, Split, Task
from farflung.protocol.errors import ConfigError, ScoreFault

PASSED_ON = ("PATH", "HOME", "LANG", "PYTHONPATH")
"""All of the parent's environment that a child sees."""
MAX_LINE_BYTES = 2**20
MAX_TRANSCRIPT_CHARS = 2**18
KEPT_STDERR_BYTES = 4096

Prompt = str | list[dict[str, str]]


class Opened(msgspec.Struct, frozen=True):
    """The child's answer to `open`."""

    version: str = ""
    spec: dict[str, Any] = {}
    network: str = "shared"
    error: str | None = None


class Listed(msgspec.Struct, frozen=True):
    """A line of the child's answer to `tasks`: a task, the end or an error."""

    task: Task | None = None
    prompt: Prompt = ""
    end: bool = False
    count: int = 0
    error: str | None = None


class Scored(msgspec.Struct, frozen=True):
    """The child's answer to `score`."""

    reward: float = -1.0
    parts: dict[str, float] = {}
    answer: str = ""
    error: str | None = None


Line = TypeVar("Line", Opened, Listed, Scored)


class Pipe:
    """One child process from its start to its end."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise ValueError("the scorer's child was started without pipes; use Pipe.open")
        self.process, self.requests, self.replies = process, process.stdin, process.stdout
        self.last_words = b""
        self.listening = asyncio.create_task(self.listen(process.stderr))

    @classmethod
    async def open(cls, command: list[str], max_line_bytes: int) -> Self:
        """Start the command in a process group of its own, with a scrubbed environment."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=child_environment(),
            limit=max_line_bytes,
            start_new_session=True,
        )
        return cls(process)

    async def listen(self, printed: asyncio.StreamReader) -> None:
        """Read what the child prints, so that it never blocks, and keep only the end."""
        while chunk := await printed.read(KEPT_STDERR_BYTES):
            self.last_words = (self.last_words + chunk)[-KEPT_STDERR_BYTES:]

    async def send(self, request: dict[str, Any]) -> None:
        """Write one line; ScoreFault if the child is not there to read it."""
        try:
            self.requests.write(json.dumps(request).encode() + b"\n")
            await self.requests.drain()
        except ConnectionError as error:
            raise ScoreFault(await self.obituary()) from error

    async def read(self, kind: type[Line]) -> Line:
        """The child's next line as `kind`; ScoreFault if it is over-long, malformed or never comes."""
        try:
            line = await self.replies.readline()
        except ValueError as error:  # asyncio's word for a line over the limit
            raise ScoreFault("the scorer wrote a line over the limit and was killed") from error
        if not line.endswith(b"\n"):
            raise ScoreFault(await self.obituary())
        try:
            return msgspec.json.decode(line, type=kind)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise ScoreFault(f"the scorer wrote a malformed line ({error}): {line[:80]!r}") from error

    async def obituary(self) -> str:
        """How the child ended, with its last words."""
        status = await self.process.wait()
        await asyncio.wait([self.listening], timeout=1)
        return f"the scorer ended with status {status}: {self.last_words.decode(errors='replace').strip()[-500:]}"

    async def close(self) -> None:
        """Kill the whole group and reap the child."""
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.killpg(self.process.pid, signal.SIGKILL)
        self.requests.close()
        await self.process.wait()
        await self.listening


class ScorerChild:
    """An environment in a child process that is replaced whenever it fails.

    Arguments
        env, args         what `load_env` takes
        python            the child's interpreter, by default this one; farflung must be importable there
        memory_bytes      the child's address space
        open_timeout_s    time to start and load the environment
        max_line_bytes    longest line taken from the child
    """

    def __init__(
        self,
        env: str,
        args: dict[str, Any] | None = None,
        *,
        python: str = sys.executable,
        memory_bytes: int = 2 * 2**30,
        open_timeout_s: float = 60.0,
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> None:
        self.env, self.args = env, dict(args or {})
        self.command = [python, "-P", "-m", "farflung.envs.child_main", "--memory-bytes", str(memory_bytes)]
        self.open_timeout_s, self.max_line_bytes = open_timeout_s, max_line_bytes
        self.opened = Opened()
        self.starts = 0
        self._pipe: Pipe | None = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> Opened:
        """Start the child unless it runs; ConfigError if the environment cannot be loaded."""
        async with self._turn:
            await self._running()
        return self.opened

    async def tasks(self, split: Split, limit: int, timeout_s: float = 120.0) -> list[tuple[Task, Prompt]]:
        """The first `limit` tasks of a split, each with its prompt."""
        found: list[tuple[Task, Prompt]] = []
        async with self._turn, self._asking(timeout_s, f"listing {limit} tasks") as pipe:
            await pipe.send({"op": "tasks", "split": split, "limit": limit})
            while not (line := await pipe.read(Listed)).end:
                if line.task is None or len(found) >= limit:
                    raise ScoreFault(f"environment {self.env!r} failed to list tasks: {line.error or 'too many'}")
                found.append((line.task, line.prompt))
        return found

    async def score(self, task: Task, transcript: str, timeout_s: float = 10.0) -> Score:
        """Judge a transcript; ScoreFault after a timeout, a crash, an error of the environment or a malformed line."""
        if len(transcript) > MAX_TRANSCRIPT_CHARS:
            raise ScoreFault(f"transcript of {len(transcript)} characters; at most {MAX_TRANSCRIPT_CHARS} are scored")
        async with self._turn, self._asking(timeout_s, "scoring") as pipe:
            await pipe.send({"op": "score", "task": task, "transcript": transcript})
            line = await pipe.read(Scored)
        if line.error is not None:
            raise ScoreFault(f"environment {self.env!r}: {line.error}")
        if not 0 <= line.reward <= 1:
            raise ScoreFault(f"environment {self.env!r} gave reward {line.reward}; a reward lies in [0, 1]")
        return Score(reward=line.reward, parts=line.parts, answer=line.answer)

    async def close(self) -> None:
        """Kill the child if there is one; the next call would start another."""
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            await pipe.close()

    async def _running(self) -> Pipe:
        """The child, started with its environment open unless it runs already."""
        if self._pipe is not None and self._pipe.process.returncode is None:
            return self._pipe
        await self.close()
        self._pipe = pipe = await Pipe.open(self.command, self.max_line_bytes)
        self.starts += 1
        async with self._killing(self.open_timeout_s, "loading the environment"):
            await pipe.send({"op": "open", "env": self.env, "args": self.args})
            self.opened = await pipe.read(Opened)
            if self.opened.error is not None:
                raise ConfigError(self.opened.error.removeprefix("ConfigError: "))
        return pipe

    @contextlib.asynccontextmanager
    async def _asking(self, timeout_s: float, doing: str) -> AsyncIterator[Pipe]:
        """One exchange with a running child; starting it does not count against the time."""
        pipe = await self._running()
        async with self._killing(timeout_s, doing):
            yield pipe

    @contextlib.asynccontextmanager
    async def _killing(self, timeout_s: float, doing: str) -> AsyncIterator[None]:
        """Kill the child if the exchange is cut short by anything: its next line would answer the wrong question."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            await self.close()
            raise ScoreFault(f"the scorer took longer than {timeout_s} s for {doing} and was killed") from error
        except BaseException:
            await self.close()
            raise


def child_environment() -> dict[str, str]:
    """A scrubbed environment: no secret of the run, one hash seed and one thread for all."""
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {**passed_on, "PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
