"""The scorer's child as a real process, with an environment that does everything it should not."""

import asyncio
import json
import os
import time

import psutil
import pytest

from farflung.envs.child import MAX_TRANSCRIPT_CHARS, ScorerChild
from farflung.protocol.errors import ConfigError, ScoreFault

NASTY = """
import json, os, socket, subprocess, sys, threading, time
from farflung.envs.base import Score

class Env:
    version = "7"
    spec = {}

    def tasks(self, split):
        print("listing", flush=True)
        for number in range(1000):
            yield {"number": number, "split": split}

    def prompt(self, task):
        return [{"role": "user", "content": str(task["number"])}]

    def score(self, task, transcript):
        print('{"reward": 1.0}', flush=True)
        os.write(1, b'{"reward": 1.0, "error": null}\\n')
        return getattr(self, transcript)()

    def right(self): return Score(reward=1, parts={"a": 0.5}, answer="x\\ud800" + "y" * 5000)
    def sleeps(self): time.sleep(60)
    def spins(self):
        while True: pass
    def raises(self): raise RuntimeError("no")
    def exits(self): sys.exit(3)
    def dies(self):
        print("last words", file=sys.stderr, flush=True)
        os._exit(9)
    def recurses(self): return self.recurses()
    def hogs(self): return Score(reward=float(len(bytearray(8 << 30)) > 0))
    def above(self): return Score(reward=1.5)
    def nan(self): return Score(reward=float("nan"))
    def nan_part(self): return Score(reward=1.0, parts={"a": float("nan")})
    def no_score(self): return 1.0
    def reads(self): return Score(reward=0.0, answer=repr(sys.stdin.read()))
    def environ(self): return Score(reward=0.0, answer=json.dumps(sorted(os.environ)))
    def dials(self):
        try: socket.create_connection(("127.0.0.1", int(os.environ.get("NONE", PORT))), timeout=2)
        except OSError as error: return Score(reward=0.0, answer=type(error).__name__)
        return Score(reward=0.0, answer="connected")
    def forks(self):
        child = subprocess.Popen(["sleep", "1000"])
        open(MARK, "w").write(str(child.pid))
        time.sleep(60)
    def floods(self):
        for fd in range(3, 20):
            try: os.write(fd, b"x" * (3 << 20))
            except OSError: pass
        time.sleep(60)
    def babbles(self):
        for fd in range(3, 20):
            try: os.write(fd, b"not json\\n")
            except OSError: pass
        return Score(reward=1.0)
    def prints(self):
        print("x" * (8 << 20))
        return Score(reward=1.0)
    def writes(self):
        with open(MARK, "wb") as file: file.write(b"x" * (64 << 20))
        return Score(reward=1.0)
"""


@pytest.fixture
def nasty(tmp_path):
    path = tmp_path / "nasty.py"
    path.write_text(NASTY.replace("MARK", repr(str(tmp_path / "mark"))).replace("PORT", "9"))
    return f"{path}:Env"


def ask(env, said, timeout_s=10.0, **options):
    async def one():
        async with ScorerChild(env, **options) as child:
            return await child.score({}, said, timeout_s)

    return asyncio.run(one())


def test_scores_the_built_in_sums():
    async def play():
        async with ScorerChild("sums", {"digits": 2}) as child:
            listed = await child.tasks("eval", 20)
            task, prompt = listed[0]
            assert (len(listed), prompt) == (20, "+".join(map(str, task["terms"])) + "=")
            assert (await child.score(task, f"={sum(task['terms'])}")).reward == 1
            assert (await child.score(task, "=0")).reward == 0
            assert (child.opened.version, child.opened.spec) == ("1", {"digits": 2, "terms": 2})

    asyncio.run(play())


def test_prints_do_not_corrupt_the_protocol(nasty):
    async def play():
        async with ScorerChild(nasty) as child:
            assert [task["number"] for task, _ in await child.tasks("train", 3)] == [0, 1, 2]
            for _ in range(3):
                score = await child.score({}, "right")
                assert (score.reward, score.parts, score.answer[:3]) == (1.0, {"a": 0.5}, "x?y")
                assert len(score.answer) == 1000
            assert (await child.score({}, "prints")).reward == 1
            assert child.starts == 1

    asyncio.run(play())


@pytest.mark.parametrize("said", ["sleeps", "spins", "floods"])
def test_a_child_that_does_not_answer_is_killed_and_replaced(nasty, said):
    async def play():
        async with ScorerChild(nasty) as child:
            started = time.monotonic()
            with pytest.raises(ScoreFault, match="killed"):
                await child.score({}, said, timeout_s=0.5)
            assert time.monotonic() - started < 5
            assert (await child.score({}, "right")).reward == 1
            assert child.starts == 2

    asyncio.run(play())


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("raises", "RuntimeError: no"),
        ("exits", "SystemExit: 3"),
        ("recurses", "RecursionError"),
        ("hogs", "MemoryError"),
        ("above", r"reward lies in \[0, 1\]"),
        ("nan", r"reward lies in \[0, 1\]"),
        ("nan_part", "every part is a finite number"),
        ("no_score", "returned float"),
        ("unknown", "AttributeError"),
        ("writes", "OSError"),
    ],
)
def test_a_fault_of_the_environment_is_an_answer_and_the_child_lives(nasty, said, words):
    async def play():
        async with ScorerChild(nasty) as child:
            with pytest.raises(ScoreFault, match=words):
                await child.score({}, said)
            assert (await child.score({}, "right")).reward == 1
            assert child.starts == 1

    asyncio.run(play())


def test_a_crash_reports_the_last_words_and_the_next_child_works(nasty):
    async def play():
        async with ScorerChild(nasty) as child:
            with pytest.raises(ScoreFault, match=r"status 9: [\s\S]*last words"):
                await child.score({}, "dies")
            assert (await child.score({}, "right")).reward == 1

    asyncio.run(play())


def test_malformed_lines_are_refused(nasty):
    with pytest.raises(ScoreFault, match="malformed line"):
        ask(nasty, "babbles")


def test_over_long_lines_are_refused():
    async def play():
        async with ScorerChild("sums", max_line_bytes=256) as child:
            child.max_line_bytes = 64
            await child.close()
            with pytest.raises(ScoreFault, match="over the limit"):
                await child.tasks("train", 5)

    asyncio.run(play())


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_grandchildren_die_with_the_child(nasty, tmp_path):
    with pytest.raises(ScoreFault):
        ask(nasty, "forks", timeout_s=1.0)
    pid = int((tmp_path / "mark").read_text())
    until = time.monotonic() + 5.0
    while _is_running(pid) and time.monotonic() < until:  # a signal takes a moment to arrive
        time.sleep(0.02)
    assert not _is_running(pid)


def test_the_environment_is_scrubbed(nasty, monkeypatch):
    monkeypatch.setenv("FARFLUNG_SECRET", "s3cret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    seen = set(json.loads(ask(nasty, "environ").answer))
    allowed = {
        "PATH",
        "HOME",
        "LANG",
        "PYTHONPATH",
        "PYTHONHASHSEED",
        "PYTHONIOENCODING",
        "OMP_NUM_THREADS",
        "LC_CTYPE",
    }
    assert seen <= allowed


def test_stdin_is_not_the_protocol(nasty):
    assert ask(nasty, "reads").answer == "''"


def test_there_is_no_network_where_the_kernel_lets_us(tmp_path):
    async def play():
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        path = tmp_path / "nasty.py"
        path.write_text(NASTY.replace("PORT", str(server.sockets[0].getsockname()[1])))
        async with server, ScorerChild(f"{path}:Env") as child:
            if child.opened.network == "shared":
                pytest.skip("this kernel gives no network namespace without privileges")
            assert (await child.score({}, "dials")).answer != "connected"

    asyncio.run(play())


def test_a_memory_limit_holds(nasty):
    with pytest.raises(ScoreFault, match="MemoryError"):
        ask(nasty, "hogs", memory_bytes=512 * 2**20)


def test_an_environment_that_cannot_be_loaded_is_a_config_error():
    async def play():
        child = ScorerChild("smus")
        with pytest.raises(ConfigError, match="did you mean 'sums'"):
            await child.start()
        await child.close()

    asyncio.run(play())


def test_an_interpreter_without_farflung_says_so():
    async def play():
        with pytest.raises(ScoreFault, match="ended with status"):
            await ScorerChild("sums", python="/bin/false").start()

    asyncio.run(play())


def test_long_transcripts_are_refused_and_cancelled_calls_do_not_mix_answers():
    async def play():
        async with ScorerChild("sums") as child:
            with pytest.raises(ScoreFault, match="characters"):
                await child.score({"terms": [1, 2]}, "x" * (MAX_TRANSCRIPT_CHARS + 1))
            cut_short = asyncio.create_task(child.score({"terms": [1, 2]}, "=3"))
            await asyncio.sleep(0)
            cut_short.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cut_short
            found = await asyncio.gather(*(child.score({"terms": [1, 2]}, f"={i}") for i in range(6)))
            assert [score.reward for score in found] == [0, 0, 0, 1, 0, 0]

    asyncio.run(play())


def test_closing_leaves_no_process(nasty):
    before = {process.pid for process in psutil.Process(os.getpid()).children(recursive=True)}
    ask(nasty, "right")
    assert {process.pid for process in psutil.Process(os.getpid()).children(recursive=True)} <= before
