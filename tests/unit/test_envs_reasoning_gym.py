import random
import sys

import pytest

from farflung.envs.reasoning_gym import ALLOWED, ReasoningGym, solves
from farflung.protocol.errors import ConfigError

SMALL_SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
PUZZLE = {"words": ["ONWJF", "SLFJW"], "total": "LSSLF", "zero_leads": False}


@pytest.fixture(scope="module", autouse=True)
def imported():
    pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_oracle_is_worth_one_and_junk_nothing(name):
    env = ReasoningGym(name, size=6)
    tasks = [task for split in ("train", "eval") for task in env.tasks(split)]
    assert tasks
    for task in tasks:
        assert env.score(task, f"I think so.\nAnswer: {task['answer']}").reward == 1
        assert env.score(task, task["answer"]).reward == 1
        for junk in ("", "I do not know", "Answer:", "4242424242"):
            assert env.score(task, junk).reward == 0


def test_sums_for_a_chat_model():
    env = ReasoningGym("chain_sum", SMALL_SUMS, size=50)
    task = {"question": "What is 12 + 30 =", "answer": "42"}
    assert env.prompt(task) == [{"role": "user", "content": "What is 12 + 30 =\nAnswer with only the number."}]
    assert env.score(task, "12 + 30 is 42, of course.").reward == 1
    assert env.score(task, "42, or rather 43").reward == 0


def test_answer_mode_suffix_and_chat_are_settings():
    env = ReasoningGym("chain_sum", SMALL_SUMS, size=5, answer="exact", suffix="", chat=False)
    task = {"question": "2 + 2 =", "answer": "4"}
    assert env.prompt(task) == "2 + 2 ="
    assert env.score(task, " 4 ").reward == 1
    assert env.score(task, "It is 4").reward == 0
    assert ReasoningGym(**env.spec).spec == env.spec


def test_listing_words_pays_nothing():
    env = ReasoningGym("syllogism", size=5)
    task = {"question": "…?", "answer": "Yes"}
    assert env.score(task, "Answer: Yes or No").reward == 0
    assert env.score(task, "Yes\nNo").reward == 0


def test_tasks_do_not_touch_the_global_random_state():
    env = ReasoningGym("chain_sum", SMALL_SUMS, size=50)
    random.seed(1)
    first = list(env.tasks("train"))
    random.seed(2)
    assert first == list(env.tasks("train"))


def test_a_cryptarithm_has_many_right_answers_and_each_is_checked():
    assert solves(PUZZLE, "F=4,J=9,L=8,N=7,O=2,S=5,W=0")
    assert not solves(PUZZLE, "F=4,J=9,L=8,N=7,O=2,S=5,W=1")
    assert not solves(PUZZLE, "F=4,J=9,L=8,N=7,O=2,S=5")
    assert not solves(PUZZLE, "F=4,J=9,L=8,N=7,O=2,S=5,W=0,W=0")
    assert not solves({"words": ["A", "B"], "total": "C", "zero_leads": False}, "A=0,B=1,C=1")


def test_a_wrong_number_earns_by_its_digits_in_training_alone():
    env = ReasoningGym("chain_sum", {"min_terms": 2, "max_terms": 2}, size=50, digits=0.5)
    trained, held_out = next(env.tasks("train")), next(env.tasks("eval"))
    assert "graded" not in held_out
    right = trained["answer"]
    wrong = right[:-1] + str((int(right[-1]) + 1) % 10)
    assert env.score(trained, right).reward == 1.0
    assert env.score(trained, wrong).reward == 0.5 * len(right) / (len(right) + 1)
    assert env.score(held_out, held_out["answer"]).reward == 1.0
    assert env.score(trained | {"graded": False}, wrong).reward == 0.0
    assert ReasoningGym(**env.spec).spec == env.spec
    with pytest.raises(ConfigError, match="digits = 1"):
        ReasoningGym("chain_sum", digits=1)


def test_unsafe_and_misspelt_tasks_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'chain_sum'"):
        ReasoningGym("chain_sun")
    with pytest.raises(ConfigError, match="list of safe ones"):
        ReasoningGym("countdown")


@pytest.mark.parametrize("config", [{"no_such": 1}, {"min_terms": 0}])
def test_a_refused_config_says_so(config):
    with pytest.raises(ConfigError, match="refuses config"):
        ReasoningGym("chain_sum", config)


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"farflung\[envs\]"):
        ReasoningGym("chain_sum")
