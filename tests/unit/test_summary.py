"""Figures of a run that need no database."""

import pytest
import sqlalchemy as sa

from farflung.launch.summary import first_and_last, steady
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
        assert steady(connection, "run", lines) is None, "nobody is trusted yet"
        moves = [move(9, "good", "trusted"), move(15, "turned", "trusted"), move(20, "cheat", "ejected")]
        connection.execute(EVENTS.insert(), [*moves, move(98, "turned", "ejected")])
        assert steady(connection, "run", lines) == pytest.approx(1 / 110, abs=1e-4)
