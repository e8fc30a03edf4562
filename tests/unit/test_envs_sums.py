from itertools import islice

import pytest

from farflung.envs.sums import Sums, worked
from farflung.protocol.errors import ConfigError


def test_works_from_the_units():
    assert worked([123, 989]) == "39:12 281:11 191:11 =1112"
    assert worked([123, 456]) == "36:9 25:7 14:5 =579"
    assert worked([999, 999, 999]) == "999:27 9992:29 9992:29 =2997"


def test_a_forgotten_carry_shows_in_the_working_and_in_the_answer():
    assert worked([123, 989], lambda: False) == "39:12 28:10 19:10 =1002"


def test_prompt_and_completion_are_short():
    env = Sums()
    for task in islice(env.tasks("train"), 200):
        assert len(env.prompt(task)) == 8
        assert len(worked(task["terms"])) <= 25


@pytest.mark.parametrize(
    ("transcript", "reward", "answer"),
    [
        ("39:12 281:11 191:11 =1112", 1, "1112"),
        ("=1112", 1, "1112"),
        ("39:12 28:10 19:10 =1002", 0, "1002"),
        ("=1112=1112", 0, "1112=1112"),
        ("=1002 =1112", 0, "1002 =1112"),
        ("=01112", 0, "01112"),
        ("=1112 1113", 0, "1112 1113"),
        ("1112", 0, ""),
        ("=１１１２", 0, "１１１２"),
        ("", 0, ""),
    ],
)
def test_only_one_exact_final_answer_counts(transcript, reward, answer):
    score = Sums().score({"terms": [123, 989]}, transcript)
    assert (score.reward, score.answer) == (reward, answer)


def test_parts_tell_how_much_was_worked_right():
    score = Sums().score({"terms": [123, 989]}, "39:12 28:10 19:10 =1002")
    assert score.parts == {"format": 1.0, "columns": pytest.approx(1 / 3)}


def test_tasks_are_lazy_and_always_the_same():
    env = Sums(digits=9, terms=3)
    first = list(islice(env.tasks("train"), 20))
    assert first == list(islice(Sums(digits=9, terms=3).tasks("train"), 20))
    assert all(len(task["terms"]) == 3 and len(str(task["terms"][0])) == 9 for task in first)


def test_every_question_comes_once():
    env = Sums(digits=1)
    found = [tuple(task["terms"]) for split in ("train", "eval") for task in env.tasks(split)]
    assert sorted(found) == [(a, b) for a in range(10) for b in range(10)]


def test_swapped_terms_are_held_out_together():
    env = Sums(digits=1)
    held_out = {tuple(task["terms"]) for task in env.tasks("eval")}
    assert held_out == {(b, a) for a, b in held_out}


@pytest.mark.parametrize("args", [{"digits": 0}, {"digits": 10}, {"terms": 1}])
def test_impossible_sizes_are_refused(args):
    with pytest.raises(ConfigError, match="give a number"):
        Sums(**args)
