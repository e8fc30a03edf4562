import pytest

from farflung.envs import answers


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("The answer is 42.", "42"),
        ("12 + 30 = 42", "42"),
        ("7-5", "5"),
        ("it is -5", "-5"),
        ("so: −5", "−5"),
        ("1,234.50 in all", "1,234.50"),
        ("1,2,3", "3"),
        ("no number", ""),
        ("x1 and x2", "2"),
    ],
)
def test_last_number(reply, found):
    assert answers.last_number(reply) == found


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("thinking\nAnswer: Friday.", "Friday"),
        ("Answer: Monday\nAnswer: **Friday**\nbye", "Friday"),
        ("<answer>a</answer> no: <answer> b </answer>", "b"),
        ("<answer>unclosed", "unclosed"),
        ("first\nlast line\n", "last line"),
        ("Answer:\n 5", "5"),
        ("Answer:", ""),
        ("", ""),
    ],
)
def test_tagged(reply, found):
    assert answers.tagged(reply) == found


@pytest.mark.parametrize(
    ("reply", "found"),
    [("B", "B"), ("(C)", "C"), ("Answer: D. because", "D"), ("A or B", ""), ("nothing", ""), ("I say B", "B")],
)
def test_choice_does_not_hedge(reply, found):
    assert answers.choice(reply) == found


@pytest.mark.parametrize(
    ("found", "right", "is_same"),
    [
        ("+1,000.0", "1000", True),
        ("7.14", "7.140", True),
        ("yes", "Yes", True),
        ("b,  a", "b, a", True),
        ("5 6", "5", False),
        ("", "", False),
        ("1" * 5000, "1", False),
        ("1e3", "1000", False),
    ],
)
def test_same(found, right, is_same):
    assert answers.same(found, right) is is_same


@pytest.mark.parametrize(
    ("found", "share"),
    [
        ("108", 1.0),
        ("107", 3 / 4),
        ("8", 2 / 4),
        ("1,108", 4 / 5),
        ("-108", 3 / 4),
        ("", 0.0),
        ("10.8", 0.0),
        ("801", 2 / 4),
    ],
)
def test_digits_count_from_the_units_and_the_sign_as_one(found, share):
    assert answers.digits_right(found, "108") == pytest.approx(share)
