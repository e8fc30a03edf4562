"""Figures of a run that need no database."""

import pytest
import sqlalchemy as sa

from farflung.config import Config, PricesSection
from farflung.launch.summary import first_and_last, steady
from farflung.net import node_stats
from farflung.queries.cost import overhead, used
from farflung.store.tables import EVENTS, metadata


def test_a_run_begins_and_ends_with_the_mean_of_five_steps():
    rewards = [0.1, 0.2, 0.3, 0.4, 0.5, 9.0, 9.0, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert first_and_last(rewards) == (pytest.approx(0.3), pytest.approx(0.8))


@pytest.mark.parametrize(
    ("rewards", "found"),
    [([], (None, None)), ([0.4], (0.4, 0.4)), ([0.1, 0.3, 0.8], (0.1, 0.8)), ([0.0, 0.2, 0.4, 0.8], (0.1, 0.6))],
)
def test_a_short_run_is_cut_in_halves(rewards, found):
    first, last = first_and_last(rewards)
    assert (first, last) == (pytest.approx(found[0]), pytest.approx(found[1]))


def line(role, heard_at, work, started_at=0.0):
    return {"kind": "node", "node": role, "role": role, "started_at": started_at, "heard_at": heard_at, "at": heard_at,
            "work_cpu_s": work, "proof_cpu_s": 0.0}  # fmt: skip


def on_device(role, work_s, proof_s=0.0):
    return line(role, 1, 0.1) | {"work_device_s": work_s, "proof_device_s": proof_s}


def test_overhead_is_in_what_was_used():
    """Accelerators alone, processors alone, and a mix that is compared by what they cost."""
    prices = PricesSection(accelerator_cores=20.0)
    assert overhead([on_device("worker", 8.0, 1.0), on_device("validator", 3.0)], prices) == pytest.approx(0.5)
    assert overhead([line("worker", 1, 8.0), line("validator", 1, 4.0)], prices) == pytest.approx(0.5)
    assert overhead([on_device("worker", 2.0), line("worker", 1, 10.0), line("validator", 1, 5.0)], prices) == 0.1
    assert overhead([on_device("validator", 2.0)], prices) is None
    assert used(on_device("worker", 5.0), "work", prices, since=on_device("worker", 2.0)) == pytest.approx(60.0)


@pytest.mark.parametrize("accelerators", [0, 1, 4])
def test_a_role_counts_the_time_of_each_accelerator_and_its_own_of_the_processor(accelerators, monkeypatch):
    clock = iter([100.0, 103.0, 107.0])
    monkeypatch.setattr(node_stats.time, "monotonic", lambda: next(clock))
    stats = node_stats.NodeStats(accelerators=accelerators)
    with stats.working("made") as so_far:
        assert so_far()[1] == 3.0 * accelerators
    assert stats.made_device_s == 7.0 * accelerators
    assert 0 <= stats.made_cpu_s < 1.0, "this thread did next to nothing"
    assert (stats.work_device_s, stats.proof_device_s) == (0.0, 0.0)


def test_a_server_on_the_processor_costs_a_core_while_it_computes(monkeypatch):
    clock = iter([100.0, 107.0])
    monkeypatch.setattr(node_stats.time, "monotonic", lambda: next(clock))
    stats = node_stats.NodeStats(is_served=True)
    with stats.working():
        pass
    assert (stats.work_cpu_s, stats.work_device_s) == (7.0, 0.0)


def test_what_two_leases_of_one_server_share_is_counted_once(monkeypatch):
    """The first from 100 to 110, the second from 105 to 120 and, after a pause, one from 130 to 131."""
    clock = iter([100.0, 105.0, 110.0, 120.0, 130.0, 131.0])
    monkeypatch.setattr(node_stats.time, "monotonic", lambda: next(clock))
    stats = node_stats.NodeStats(is_served=True, accelerators=2)
    first, second, third = (stats.working() for _ in range(3))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert stats.work_cpu_s == 10.0
    second.__exit__(None, None, None)
    with third:
        pass
    assert (stats.work_cpu_s, stats.work_device_s) == (21.0, 42.0)


def move(at, subject, after):
    return {"at": at, "noun": "node", "subject": subject, "before": "", "after": after, "detail": ""}


def test_the_steady_overhead_leaves_out_what_was_done_for_nodes_on_probation():
    """A cheat that never earned trust is audited in full until it is ejected; one that did counts from then on."""
    engine = sa.create_engine("sqlite://")
    metadata.create_all(engine)
    lines = [line("validator", 2, 9.0, started_at=-5.0)]  # it ended before anybody was trusted
    lines += [line("validator", 1, 1.0), line("worker", 1, 5.0), line("validator", 21, 4.0), line("worker", 22, 10.0)]
    lines += [line("validator", 99, 5.0), line("worker", 99, 110.0), line("worker", 99, 10.0, started_at=50.0)]
    with engine.connect() as connection:
        assert steady(connection, Config(), lines) is None, "nobody is trusted yet"
        moves = [move(9, "good", "trusted"), move(15, "turned", "trusted"), move(20, "cheat", "ejected")]
        connection.execute(EVENTS.insert(), [*moves, move(98, "turned", "ejected")])
        assert steady(connection, Config(), lines) == pytest.approx(1 / 110, abs=1e-4)
