from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.envs import answers
from farflung.envs.reasoning_gym import ReasoningGym
from farflung.envs.split import shuffled, split_of
from farflung.envs.sums import Sums, worked

HOSTILE = st.one_of(
    st.text(max_size=300),
    st.text(alphabet="0123456789=+-,.: \n", max_size=300),
    st.text(alphabet=st.characters(codec=None), max_size=50),
    st.sampled_from(["=" * 9000, "9" * 9000, "1," * 9000, "Answer:" * 3000, "<answer>" * 3000, "\ud800", "\x00"]),
)
WHOLE = st.integers(min_value=100, max_value=999)


@given(st.integers(1, 4), st.integers(2, 4))
@settings(max_examples=20)
def test_no_sum_is_in_both_splits(digits, terms):
    env = Sums(digits, terms)
    train, held_out = ({env.prompt(task) for task in islice(env.tasks(split), 60)} for split in ("train", "eval"))
    assert train
    assert not train & held_out


@given(st.sampled_from(["chain_sum", "products", "syllogism", "letter_counting"]), st.integers(1, 80))
@settings(max_examples=15)
def test_no_reasoning_gym_question_is_in_both_splits_or_twice(name, size):
    pytest.importorskip("reasoning_gym")
    env = ReasoningGym(name, size=size)
    questions = [task["question"] for split in ("train", "eval") for task in env.tasks(split)]
    assert len(questions) == len(set(questions))


@given(st.text())
def test_a_split_ignores_case_and_spacing(question):
    assert split_of(question) == split_of(f"  {question}\n")


@given(st.integers(0, 300), st.text(max_size=5))
def test_a_shuffle_has_each_number_once(count, key):
    assert sorted(shuffled(count, key)) == list(range(count))


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=9))
def test_worked_sums_end_with_the_sum(terms):
    assert worked(terms).endswith(f"={sum(terms)}")


@given(WHOLE, WHOLE, HOSTILE)
def test_a_sum_pays_for_its_one_right_answer_alone(a, b, transcript):
    score = Sums().score({"terms": [a, b]}, transcript)
    is_right = transcript.count("=") == 1 and transcript.strip().endswith(f"={a + b}")
    assert score.reward == float(is_right)
    assert all(0 <= part <= 1 for part in score.parts.values())


@given(WHOLE, WHOLE, st.lists(st.integers(0, 1998), min_size=2, max_size=50))
def test_listing_sums_pays_nothing(a, b, guesses):
    listed = "".join(f"={guess}" for guess in [*guesses, a + b])
    assert Sums().score({"terms": [a, b]}, listed).reward == 0


@given(HOSTILE, st.sampled_from(["last_number", "tag", "exact"]))
def test_hostile_text_never_raises_and_wins_only_by_its_one_answer(transcript, place):
    found = answers.find(transcript, place)
    assert answers.same(found, "4711") == (answers.value(answers.tidy(found)) == 4711)
    assert answers.choice(transcript) in {"", *"ABCDEFGH"}


@given(
    st.lists(st.integers(0, 99), min_size=2, max_size=30, unique=True), st.sampled_from(["last_number", "tag", "exact"])
)
def test_of_a_list_of_answers_the_last_counts_at_most(guesses, place):
    listed = " ".join(map(str, guesses))
    paid = [guess for guess in guesses if answers.same(answers.find(listed, place), str(guess))]
    assert paid == ([guesses[-1]] if place == "last_number" else [])
