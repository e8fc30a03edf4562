"""The gallery of adversaries and the table of a trial: nothing about an outcome is decided beforehand."""

import gzip
import inspect

import pytest
import sqlalchemy as sa

from farflung.adversity.evaluate import _more_in_time, _more_pay, _outcome, _pay_of, _with, pay_error, run_evaluation
from farflung.config import Cheat, Config
from farflung.engine.base import Completion
from farflung.protocol import wire
from farflung.protocol.errors import ConfigError, Malformed
from farflung.protocol.messages import Submission, SubmittedRollout
from farflung.redteam import GALLERY, noises, senders
from farflung.redteam.adversary import Adversary, Attack, Cheating
from farflung.store import ledger
from farflung.store.tables import metadata
from farflung.worker import Worker

SENT = Submission(rollouts=[SubmittedRollout(rollout="r1", ids=wire.pack_ids([1, 2, 3]))])


@pytest.mark.parametrize("name", GALLERY)
def test_every_attack_says_what_it_gains_and_what_stops_it(name: str) -> None:
    attack = GALLERY[name]()
    assert isinstance(attack, Attack)
    assert ";" in (type(attack).__doc__ or "")


@pytest.mark.parametrize("body", [senders.with_reward, senders.with_nan, senders.cut, senders.huge])
def test_what_is_sent_at_the_door_is_no_honest_submission(body: senders.Body) -> None:
    with pytest.raises(Malformed):
        wire.unpack_floats(wire.decode(body(SENT), Submission).logp[0])


def test_the_bomb_is_small_and_unpacks_to_much() -> None:
    body = senders.bomb(SENT)
    assert len(body) < 100_000
    assert len(gzip.decompress(body)) == 1 << 26


def test_the_best_of_several_is_the_longest_or_the_likeliest() -> None:
    short, long = Completion((1,), (-0.1,)), Completion((1, 2), (-1.0, -1.0))
    assert max((short, long), key=noises.likely) is short
    assert max((short, long), key=noises.long) is long
    assert max((short, long), key=noises.short) is short


def test_what_an_attack_does_not_bend_is_the_true_engine_s() -> None:
    class True_:
        eos_ids = frozenset({7})

        def values(self, slices: object) -> bytes:
            return b"true"

    engine = Cheating(True_(), Attack())  # type: ignore[arg-type]
    assert engine.values(()) == b"true"
    assert engine.eos_ids == {7}


def test_outcomes_follow_from_what_was_measured() -> None:
    quiet = {"status": "probation", "layer": "", "bad_submissions": 0, "gain": 0.0, "gain_error": 0.0}
    assert _outcome(quiet | {"status": "ejected", "gain": 9.0}) == "caught"
    assert _outcome(quiet | {"layer": "sanity"}) == "caught"
    assert _outcome(quiet | {"layer": "tripwire"}) == "worthless"
    assert _outcome(quiet | {"layer": "tripwire", "bad_submissions": 1}) == "caught"
    assert _outcome(quiet | {"gain": 0.1, "gain_error": 0.06}) == "worthless"
    assert _outcome(quiet | {"gain": 0.1, "gain_error": 0.04}) == "not told apart"


def test_pay_is_compared_within_a_swarm_and_by_what_was_spent_for_it() -> None:
    honest = [(900, 3.0), (1100, 3.0)]
    assert _more_pay((500, 1.0), honest) == pytest.approx(0.5)
    assert _more_in_time(500, honest) == pytest.approx(-0.5)
    assert _more_pay((0, 0.0), honest) == _more_in_time(0, honest) == -1
    assert _more_pay((10, 1.0), []) == _more_in_time(10, [(0, 1.0)]) == 0


def test_free_garbage_cannot_hide_behind_honest_work() -> None:
    """2,880 tokens for 4 ms, by a node that was paid for 1,047 honest tokens as others are."""
    gain = _more_pay((2880, 0.004), [(1047, 0.44)])
    assert gain > 300
    quiet = {"status": "trusted", "layer": "", "bad_submissions": 0, "gain": gain, "gain_error": 0.5}
    assert _outcome(quiet) == "not told apart"


def test_what_was_kept_of_some_submissions_is_paid_less_burned() -> None:
    engine = sa.create_engine("sqlite://")
    metadata.create_all(engine)
    with engine.connect() as connection:
        paid = [ledger.Transfer(rollout, ledger.ISSUED, ledger.escrow("n"), 10) for rollout in ("a", "b", "c")]
        ledger.post(connection, [*paid, ledger.Transfer("a", ledger.escrow("n"), ledger.BURNED, 10)], "demo", 0.0)
        lines = [{"rollouts": [("a", [], []), ("b", [], [])], "cpu_s": 0.5}]
        assert _pay_of(connection, lines) == (10, 0.5)
        assert _pay_of(connection, []) == (0, 0)
    engine.dispose()


def test_the_error_of_pay_is_pooled_over_swarms_of_unlike_speed() -> None:
    assert pay_error([[90.0, 110.0], [9.0, 11.0]]) == pytest.approx((0.04 / 2 * 1.5) ** 0.5)
    assert pay_error([[100.0], []]) == 0.0


def test_an_unknown_attack_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="no attack 'nonsense'"):
        run_evaluation(Config(), ["nonsense"])


def test_a_swarm_has_the_adversaries_asked_for() -> None:
    settings = _with(Config(), (Cheat(name="nan", attack="nan"), Cheat(name="bomb-2", attack="bomb")), "x-1")
    assert settings.run.name == "x-1"
    assert [(cheat.name, cheat.attack) for cheat in settings.swarm.cheats] == [("nan", "nan"), ("bomb-2", "bomb")]


def test_whatever_an_adversary_changes_of_a_worker_is_a_workers() -> None:
    """A method that no worker has any more would never be called, and the attack would be none."""
    own = {name: value for name, value in vars(Adversary).items() if inspect.isfunction(value)}
    changed = {name for name, value in own.items() if "super()." in inspect.getsource(value)}
    assert "_engine" in changed
    assert changed <= set(dir(Worker))
