from itertools import islice

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from farflung.envs import answers, number_text
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
    assert answers.chosen_option(transcript) in {"", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"}


@given(st.lists(st.integers(0, 99), min_size=2, max_size=30, unique=True), st.sampled_from([" ", "\n", ". ", ", "]))
def test_a_list_of_answers_pays_nothing(guesses, between):
    listed = between.join(map(str, guesses))
    found = {
        answers.last_number(listed),
        answers.find(listed, "exact"),
        answers.tagged(listed) if between != "\n" else "",
    }
    assert not found & set(map(str, guesses))


NUMBER = st.one_of(
    st.integers(1, 10**6).map(str),
    st.builds("{}.{}".format, st.integers(0, 99), st.integers(1, 99)),
    st.builds("{}/{}".format, st.integers(1, 99), st.integers(2, 99)),
    st.builds("{}%".format, st.integers(1, 99)),
    st.builds("{:,}".format, st.integers(1000, 10**7)),
    st.sampled_from(["½", "2½", "1e3", "10^3", "seven", "forty-two", "-8", "$12"]),
)
BETWEEN = st.sampled_from(
    [", ", "; ", " or ", " and ", " | ", ", or ", " or maybe ", " to ", " apples or ", " versus ", ", possibly "]
)
AROUND = st.sampled_from(
    [
        "{}",
        "Answer: {}",
        "The answer is {}.",
        "\\boxed{{{}}}",
        "<answer>{}</answer>",
        "#### {}",
        "It is either {}",
        "({})",
    ]
)


@given(NUMBER, NUMBER, BETWEEN, AROUND)
@settings(max_examples=200)
def test_two_different_numbers_as_the_answer_pay_nothing(one, other, between, around):
    assume(numeric(one) != numeric(other))
    assert answers.last_number(around.format(one + between + other)) == ""


def numeric(text):
    return answers.value(answers.last_number(text))


@given(st.sampled_from("ABCDJZ"), st.sampled_from("ABCDJZ"), BETWEEN, AROUND)
def test_two_different_choices_pay_nothing(one, other, between, around):
    assume(one != other)
    assert answers.chosen_option(around.format(one + between + other)) == ""


@given(
    st.lists(st.integers(0, 2000).map(str), min_size=2, max_size=4),
    st.lists(st.sampled_from("./^:-+*e_',xπ√½²"), min_size=5, max_size=5),
)
@settings(max_examples=200)
def test_a_part_of_a_number_is_never_the_number(parts, joints):
    text = parts[0] + "".join(joint + part for joint, part in zip(joints, parts[1:], strict=False))
    found, whole = answers.last_number(text), number_text.whole(text)
    assert found == (number_text.shown(whole) if whole else "")


@given(st.fractions(max_denominator=10**6).filter(lambda number: abs(number) < 10**20), st.booleans())
def test_a_number_shown_is_read_back(value, is_percent):
    number = number_text.Number(value, 0, 0, is_percent)
    read = number_text.whole(number_text.shown(number))
    assert read is not None
    assert (read.value, read.is_percent) == (value, is_percent)


@given(WHOLE, st.sampled_from(["<think>", "so ", "Answer: ", "\\boxed{9}"]))
def test_a_thought_alone_is_no_answer(number, begins):
    assert answers.last_number(f"<think>{begins}{number}") == ""
    assert answers.tagged(f"<think>{begins}{number}") == ""
