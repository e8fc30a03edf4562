"""How an embedded run ends when it cannot go on: which roles come back, what is said, and what a full disk leaves."""

import asyncio
import json
import resource
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import settings

from farflung.config import SwarmSection, save
from farflung.launch import swarm as swarms
from farflung.launch.restarts import REFUSED
from farflung.launch.run_folder import prepare
from farflung.launch.swarm import Swarm
from farflung.protocol.messages import Latest, NodeView, Status, Verdict

CRASH = "Traceback (most recent call last):\n  File x\nIndexError: index out of range in self\n"


@asynccontextmanager
async def swarm_in(folder: Path, **swarm: Any) -> AsyncIterator[Swarm]:
    """A swarm whose forkservers are there but fork nobody: tests say which roles started and ended."""
    config = settings(folder, coordinator={"grants": {}})
    config = config.model_copy(update={"swarm": SwarmSection(**{"workers": 2, "kill": 0, **swarm})})
    prepare(config)
    one = Swarm(config, is_plain=True)
    one._is_open = True
    for kind in swarms.FORKSERVERS:
        one.processes[kind] = await asyncio.create_subprocess_exec("cat", stdin=asyncio.subprocess.PIPE, stdout=-3)
    for name in ("coordinator", "trainer", "validator-1", "scorer", "worker-1", "worker-2"):
        one._fork_role(name, name.partition("-")[0])
    try:
        yield one
    finally:
        one.is_stopping = True
        for process in one.processes.values():
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()
        await one.client.close()


def end(one: Swarm, name: str, code: int, words: str = CRASH) -> None:
    """A role that was started says something in its log, and ends."""
    one._heard("torch", {"event": "started", "name": name, "pid": 1})
    with one._log_of(name).open("a") as log:
        log.write(words)
    one._heard("torch", {"event": "ended", "name": name, "code": code})


def play(folder: Path, scene: Callable[[Swarm], None], **swarm: Any) -> Swarm:
    async def run() -> Swarm:
        async with swarm_in(folder, **swarm) as one:
            scene(one)
            return one

    return asyncio.run(run())


@pytest.mark.parametrize("name", ["coordinator", "trainer", "validator-1", "scorer"])
def test_a_role_that_ends_the_same_way_three_times_ends_the_run_with_its_last_words(tmp_path, capsys, name) -> None:
    def scene(one: Swarm) -> None:
        for number in range(2):
            end(one, name, 1)
            assert not one.failure, number
        end(one, name, 1)

    one = play(tmp_path, scene)
    assert one.failure.startswith(f"{name} ended 3 times the same way, with 1: IndexError: index out of range in self;")
    assert str(one._log_of(name)) in one.failure
    assert not one._is_refused
    said = capsys.readouterr().out
    assert said.count("starting it again: IndexError: index out of range in self") == 2
    assert one.failure in said
    restarts = [line for line in one.metrics.lines() if line["kind"] == "restart"]
    assert [(line["name"], line["code"]) for line in restarts] == [(name, 1)] * 2


@pytest.mark.parametrize("name", ["coordinator", "trainer", "validator-1", "scorer"])
def test_a_wrong_configuration_ends_the_run_at_once(tmp_path, name) -> None:
    one = play(tmp_path, lambda one: end(one, name, REFUSED, "farflung: learn.lora_rank is 8, the checkpoint has 4\n"))
    assert (one.failure, one._is_refused) == ("learn.lora_rank is 8, the checkpoint has 4", True)


def test_the_words_are_those_of_this_life(tmp_path) -> None:
    """A log is appended to; who is killed says nothing, and what an earlier life said is not the reason."""

    def scene(one: Swarm) -> None:
        end(one, "trainer", 1)
        for _ in range(3):
            one._fork_role("trainer", "trainer")
            end(one, "trainer", -signal.SIGKILL, "")

    one = play(tmp_path, scene)
    assert "with -9: killed by SIGKILL; was there memory enough?" in one.failure


def status(*nodes: NodeView, verdicts: tuple[Verdict, ...] = (), **changes: Any) -> Status:
    values: dict[str, Any] = dict.fromkeys(("run", "model", "env", "breaker"), "")
    values |= dict.fromkeys(("steps_total", "started_at", "now", "leases_open", "leases_reissued"), 0)
    values |= dict.fromkeys(("accepted", "accepted_tokens"), 0)
    values |= {"status": "running", "latest": Latest(status="running", step=0, manifest="")}
    values |= {"rollouts": {}, "groups": {}, "audits": {}, "catch": {}, "breaker_profiles": {}}
    values |= {"steps": [], "evals": [], "warnings": [], "nodes": list(nodes), "verdicts": list(verdicts)}
    return Status(**(values | changes))


def node(name: str, role: str, phase: str = "waiting", state: str = "probation", *, is_online: bool = True) -> NodeView:
    fields = dict.fromkeys(NodeView.__struct_fields__, 0)
    told = {"node": f"n-{name}", "name": name, "role": role, "phase": phase, "status": state, "is_online": True}
    return NodeView(**(fields | told))  # type: ignore[arg-type]


IDLE = (node("trainer", "trainer"), node("validator-1", "validator"), node("scorer", "scorer"))
LEFT = tuple(node(f"worker-{number}", "worker", "gone", "ejected") for number in (1, 2))


def deserted(folder: Path, monkeypatch, *looks: Status, workers: int = 2) -> Swarm:
    """A swarm whose workers have all left for good, after some looks at its status."""
    monkeypatch.setattr(swarms, "DESERTED_S", -1.0)

    def scene(one: Swarm) -> None:
        one.config = one.config.model_copy(update={"lease": one.config.lease.model_copy(update={"heartbeat_s": -1.0})})
        end(one, "worker-1", 0, "")
        for _ in range(3):
            end(one, "worker-2", 1)
        assert not one.failure, "the other roles may still come to an end"
        for look in looks:
            one._leave_if_deserted(look)

    return play(folder, scene, workers=workers)


def test_a_run_without_a_worker_ends_and_says_how_they_left(tmp_path, monkeypatch) -> None:
    verdict = dict.fromkeys(Verdict.__struct_fields__, 0)
    verdict |= {"node": "n-worker-1", "outcome": "eject", "reason": "8 of 64 tokens are not what the seeds give"}
    look = status(*IDLE, *LEFT, verdicts=(Verdict(**verdict),))  # type: ignore[arg-type]
    one = deserted(tmp_path, monkeypatch, look, look)
    assert one.failure.startswith("no worker is left: worker-1: ejected (8 of 64 tokens are not what the seeds give); ")
    assert "worker-2: worker-2 ended 3 times the same way, with 1: IndexError: index out of range" in one.failure


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (status(*IDLE, *LEFT), status(*IDLE, *LEFT, accepted=4)),
        (status(*IDLE, *LEFT), status(*IDLE, *LEFT, audits={"done": 1})),
        (status(*IDLE, node("trainer", "trainer", "training step 1")),) * 2,
        (status(*IDLE, node("v", "validator", "auditing")),) * 2,
        (status(*IDLE, node("guest", "worker", "generating")),) * 2,
        (status(*IDLE, *LEFT, status="finishing"),) * 2,
    ],
    ids=["accepted", "audited", "training", "auditing", "a guest", "finishing"],
)
def test_a_run_in_which_something_may_still_happen_goes_on(tmp_path, monkeypatch, first, then) -> None:
    assert not deserted(tmp_path, monkeypatch, first, then).failure


def test_a_run_that_lives_by_others_waits_for_them(tmp_path, monkeypatch) -> None:
    assert not deserted(tmp_path, monkeypatch, *(status(*IDLE),) * 2, workers=0).failure


def test_a_run_whose_disk_is_full_ends_in_words(tmp_path, capsys, found_run) -> None:
    """What cannot be written is said; the figures are shown all the same."""

    async def scene() -> None:
        async with swarm_in(tmp_path) as one:
            save(one.config, one.path)
            (one.folder / "farflung.db").write_bytes((found_run / "test" / "farflung.db").read_bytes())
            one.metrics.begin(1.0)
            await one._sum_up()  # opens the database while it may still grow
            size = (one.folder / "metrics.jsonl").stat().st_size
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            for name in ("summary.json", "report.html"):
                (one.folder / name).unlink()
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
            try:
                one._record("end", is_finished=False)
                await one._sum_up()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    asyncio.run(scene())
    said = capsys.readouterr().out
    assert "metrics.jsonl: cannot be written: File too large" in said
    assert "summary.json cannot be made: " in said
    assert "report.html cannot be made: " in said
    assert said.count("honest nodes ejected: 0") == 2


def test_what_the_roles_warn_of_is_on_the_screen_once(tmp_path, capsys) -> None:
    def scene(one: Swarm) -> None:
        for number in range(3):
            with one._log_of("scorer").open("a") as log:
                log.write(f"2026-01-02 03:04:05,678 ERROR farflung.scorer no score rollout=r{number} because=boom\n")
            one._show_warnings()

    one = play(tmp_path, scene)
    assert capsys.readouterr().out.count("because=boom") == 1
    assert one.screen._warning == "scorer: no score rollout=r2 because=boom (one of 3 like it)"


def test_what_a_role_is_told_survives_the_environment(tmp_path, monkeypatch) -> None:
    """The forkserver's children read the resolved settings alone: a flag goes before a variable there too."""
    from farflung.launch import forkserver

    config = settings(tmp_path)
    config.folder.mkdir(parents=True)
    save(config, config.folder / "config.json")
    monkeypatch.setenv("FARFLUNG_GENERATE__MAX_NEW_TOKENS", "999")
    found = forkserver.config_of({"config": str(config.folder / "config.json")})
    assert found.generate.max_new_tokens == config.generate.max_new_tokens
    assert (
        json.loads((config.folder / "config.json").read_text())["generate"]["max_new_tokens"]
        == found.generate.max_new_tokens
    )
