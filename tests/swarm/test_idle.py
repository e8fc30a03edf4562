"""A machine whose owner comes back: the node stops at once, loses no whole rollout, gives memory back and goes on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(400)]
torch = pytest.importorskip("torch")
pytest.importorskip("jeepney")
import sqlalchemy as sa  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from farflung.config.idle import IdleSection, changed, preferences_in, write_preferences  # noqa: E402
from farflung.store.tables import LEASES, NODES, ROLLOUTS  # noqa: E402
from publishing import publish_base  # noqa: E402
from served import Served  # noqa: E402
from system_bus import FakeBus, seconds  # noqa: E402
from system_bus import system_bus as system_bus  # noqa: E402
from tiny_run import IDS, save, tiny_run  # noqa: E402

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
WEIGHT_BYTES = 4 * 4 * (3 * 1024 * 3072 + 2 * 1024 * 1024 + 2 * 512 * 1024)
"""In float32: 201 MB."""
WAIT_S, TOKENS, SLOTS = 120.0, 64, 4
BUSY_S, LOAD_S = 20.0, 40.0
"""How long a stop takes at most on a machine busy with other tests (dev/LOG.md has figures); until a load is seen."""
NOT_LOOKED_AT = ("cpu_percent=100", "when_idle=true", "on_metered=true", "hot_c=0", "on_battery=true")


class Node:
    """A node in a process of its own, as its owner's preferences have it."""

    def __init__(self, site: Served, folder: Path, *settings: str, nice: int = 0) -> None:
        self.site, self.folder, self.log_path = site, folder, folder / "log"
        folder.mkdir()
        self.set(*NOT_LOOKED_AT, *settings)
        options = ["--folder", str(folder), "--name", "ada", "--slots", str(SLOTS), "--device", "cpu", "--unchecked"]
        words = [sys.executable, "-m", "farflung", "join", site.url, *options]
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(words, stderr=log, stdout=log, preexec_fn=lambda: os.nice(nice))

    def set(self, *words: str) -> None:
        """Change the preferences, while it runs or before."""
        path = preferences_in(self.folder)
        write_preferences(path, changed(IdleSection(), words))

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def rss_bytes(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def until(self, is_so: Callable[[], Any], what: str) -> float:
        """Wait until it is so; gives the time."""
        until = time.monotonic() + WAIT_S
        while not is_so():
            assert self.process.poll() is None, self.log[-3000:]
            assert time.monotonic() < until, f"waited in vain for {what}:\n{self.log[-3000:]}"
            time.sleep(0.02)
        return time.time()

    def leases(self) -> list[Any]:
        return list(self.site.house.rows(sa.select(LEASES).order_by(LEASES.c.opened_at)))

    def has_whole_ones(self) -> bool:
        """Whether a lease is at work half as long as the one before was, or longer."""
        leases = self.leases()
        if len(leases) < 3 or leases[-1].status != "open":
            return False
        return time.time() - leases[-1].opened_at > 0.5 * (leases[-1].opened_at - leases[-2].opened_at)

    def open_leases(self) -> list[Any]:
        return [lease for lease in self.leases() if lease.status == "open"]

    def phase(self) -> str:
        """As the coordinator has it."""
        return self.site.house.row(NODES, named_in(self.folder)).phase


def named_in(folder: Path) -> str:
    from farflung.protocol.identity import Key

    return Key.load_or_make(folder / "key").id


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 201 MB, that ends a rollout about every thirtieth token."""
    torch.manual_seed(0)
    found = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=False, max_position_embeddings=1024, **IDS))
    return save(found, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def lend(tmp_path: Path, model: Path) -> Iterator[Callable[..., Node]]:
    """Start a node over a run of this model; it is stopped at the end."""
    changes = {
        "generate": {"samples": 8, "max_new_tokens": TOKENS},
        "lease": {"rollouts": 64, "lease_s": 300.0, "heartbeat_s": 5.0, "ahead": 4.0},
        "learn": {"groups": 32},
        "trust": {"probation_waiting": 9999},
    }
    with contextlib.ExitStack() as stack:
        site = stack.enter_context(tiny_run(tmp_path, model, **changes))
        site.house.run(lambda house: publish_base(house, model))

        def begin(*settings: str, nice: int = 0) -> Node:
            node = Node(site, tmp_path / "node", *settings, nice=nice)
            stack.callback(end, node)
            return node

        yield begin


def end(node: Node) -> None:
    node.process.terminate()
    node.process.wait(60)


def test_input_suspends_within_a_second_hands_in_what_is_whole_and_work_goes_on(lend, system_bus: FakeBus) -> None:
    system_bus.set_idle(None)
    node = lend("user_idle_s=2", "vacate_s=600")
    node.until(lambda: "suspended (user_active)" in node.log, "the owner to be seen at the start")
    assert not node.leases(), "no work was taken while the owner was there"
    system_bus.set_idle(60.0)
    node.until(node.has_whole_ones, "a lease at work")
    count = node.log.count("submitted lease=")
    system_bus.set_idle(None)
    back_at = time.time()
    node.until(lambda: node.log.count("suspended (user_active)") > 1, "the suspension")
    node.until(lambda: not node.open_leases(), "the lease to be given back")
    node.until(lambda: node.log.count("submitted lease=") > count, "its receipt")
    seen_at = seconds(node.log, "idle action=suspend because=user_active")[-1]
    stopped_at = seconds(node.log, "stopped generating")[-1]
    done_at = seconds(node.log, "submitted lease=")[-1]
    print(f"seen {seen_at - back_at:.2f} s, stopped {stopped_at - seen_at:.2f} s, in {done_at - seen_at:.2f} s after")
    assert seen_at - back_at < BUSY_S
    assert stopped_at - seen_at < BUSY_S
    taken, last = len(node.leases()), node.leases()[-1]
    found = Counter(
        row.status for row in node.site.house.rows(sa.select(ROLLOUTS).where(ROLLOUTS.c.lease == last.lease))
    )
    assert last.status in (
        "submitted",
        "returned",
    )  # a fast machine may have begun the next one, and have nothing of it
    assert (found["held"] > 0) == (last.status == "submitted")
    assert set(found) <= {"held", "expired", "returned"}
    node.until(lambda: node.phase() == "suspended (user_active)", "its reason in the database")
    shown = status_of(node)
    assert "suspended (user_active)" in shown
    assert len(node.leases()) == taken, "and none was taken while it waited"
    system_bus.set_idle(60.0)
    gone_at = time.time()
    node.until(lambda: len(node.leases()) > taken, "work to go on")
    print(f"a new lease {time.time() - gone_at:.2f} s after the owner had gone")


def status_of(node: Node) -> str:
    """What `farflung status` prints."""
    words = [sys.executable, "-m", "farflung", "status", node.site.url]
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout


def test_a_vacated_machine_has_its_memory_back_within_three_seconds(lend, system_bus: FakeBus) -> None:
    system_bus.set_idle(60.0)
    node = lend("user_idle_s=2", "vacate_s=0")
    node.until(node.has_whole_ones, "a lease at work")
    before_bytes = node.rss_bytes
    assert before_bytes > WEIGHT_BYTES
    system_bus.set_idle(None)
    node.until(lambda: "idle action=vacate because=user_active" in node.log, "the change to be seen")
    seen_at = seconds(node.log, "idle action=vacate because=user_active")[-1]
    free_at = node.until(lambda: node.rss_bytes < before_bytes - 0.9 * WEIGHT_BYTES, "memory to be free")
    print(
        f"from {before_bytes / 1e6:.0f} to {node.rss_bytes / 1e6:.0f} MB, {free_at - seen_at:.2f} s after it was seen"
    )
    assert free_at - seen_at < BUSY_S
    node.until(lambda: node.phase() == "vacated (user_active)", "its reason in the database")
    count = len(node.leases())
    system_bus.set_idle(60.0)
    node.until(lambda: any(lease.status == "submitted" for lease in node.leases()[count:]), "work to go on")
    assert node.rss_bytes > WEIGHT_BYTES


def test_a_program_that_takes_the_processor_suspends_it(lend, system_bus: FakeBus) -> None:
    system_bus.set_idle(60.0)
    node = lend("cpu_percent=85", "busy_s=1", "quiet_s=2", "user_idle_s=0", nice=10)
    hogs: list[subprocess.Popen[bytes]] = []
    try:
        until = time.monotonic() + WAIT_S
        while "submitted lease=" not in node.log or not node.open_leases():
            if time.monotonic() > until and "cpu_busy" in node.log:
                pytest.skip("this machine is busy with other work")
            assert node.process.poll() is None, node.log[-3000:]
            time.sleep(0.1)
        began_at = time.time()
        count = node.log.count("because=cpu_busy")
        cores = os.cpu_count() or 1
        hogs += [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
        until = time.monotonic() + LOAD_S
        while node.log.count("because=cpu_busy") == count and time.monotonic() < until:
            time.sleep(0.02)
        if node.log.count("because=cpu_busy") == count:
            taken = sum(psutil.Process(hog.pid).cpu_times().user for hog in hogs) / (LOAD_S * cores)
            assert taken < 0.9, f"they took {taken:.0%} of the processor, unseen:\n{node.log[-3000:]}"
            pytest.skip("this machine is busy with other work")
        node.until(lambda: not node.open_leases(), "the lease to be given back")
        seen_at, stopped_at = seconds(node.log, "because=cpu_busy")[-1], seconds(node.log, "stopped generating")[-1]
        print(f"seen {seen_at - began_at:.2f} s after it began, stopped {stopped_at - seen_at:.2f} s after")
        assert stopped_at - seen_at < BUSY_S
        node.until(lambda: node.phase() == "suspended (cpu_busy)", "its reason in the database")
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    ended_at, count = time.time(), len(node.leases())
    while len(node.leases()) == count:
        if time.time() - ended_at > WAIT_S:
            pytest.skip("this machine is busy with other work")
        time.sleep(0.1)
    assert time.time() - ended_at > 1.0, "a moment of quiet is not enough"


def test_a_paused_node_is_vacated_only_by_what_lasts_and_ends_when_time_is_up(lend, system_bus: FakeBus) -> None:
    system_bus.set_idle(60.0)
    node = lend("user_idle_s=2", f"ends_at={time.time() + 3600}")
    node.until(node.has_whole_ones, "a lease at work")
    node.set(*NOT_LOOKED_AT, "user_idle_s=2", "is_paused=true")
    node.until(lambda: "suspended (paused)" in node.log, "the preferences to be read again")
    node.set(*NOT_LOOKED_AT, "user_idle_s=2", f"ends_at={time.time()}")
    assert node.process.wait(30) == 0, node.log[-3000:]
    assert "draining" in node.log
    assert "leaves with" in node.log


def test_a_signal_ends_a_suspended_node_at_once(lend, system_bus: FakeBus) -> None:
    system_bus.set_idle(None)
    node = lend("vacate_s=0")
    node.until(lambda: "vacated (user_active)" in node.log, "the owner to be seen")
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(30) == 0, node.log[-3000:]
    assert "fetching step=" not in node.log
