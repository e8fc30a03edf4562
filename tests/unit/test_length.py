"""Length budgets, worked by hand."""

from collections import Counter

import pytest

from farflung.config import Config
from farflung.envs.length import penalty, target_of, tell

ASK = "{prompt}\nThink for about {tokens} tokens."


@pytest.mark.parametrize(
    ("tokens", "target", "expected"), [(1000, 1000, 0.0), (3000, 1000, 0.6), (250, 1000, 0.225), (77, 0, 0.0)]
)
def test_the_penalty_is_the_distance_times_its_weight(tokens: int, target: int, expected: float) -> None:
    assert penalty(tokens, target, 0.0003) == pytest.approx(expected)


def test_the_prompt_names_the_target_and_braces_of_a_question_stay() -> None:
    assert tell("what is {tokens}?", 64, ASK) == "what is {tokens}?\nThink for about 64 tokens."
    assert tell("2+2=", 0, ASK) == "2+2="


def test_of_chat_messages_the_last_one_names_it() -> None:
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2="}]
    assert tell(chat, 8, ASK) == [chat[0], {"role": "user", "content": "2+2=\nThink for about 8 tokens."}]
    assert chat[1]["content"] == "2+2="


def test_targets_are_drawn_evenly_and_stay() -> None:
    drawn = [target_of(b"%d" % i, 7, (1000, 2000)) for i in range(1000)]
    assert drawn == [target_of(b"%d" % i, 7, (1000, 2000)) for i in range(1000)]
    assert 430 < Counter(drawn)[1000] < 570
    assert drawn != [target_of(b"%d" % i, 8, (1000, 2000)) for i in range(1000)]
    assert target_of(b"1", 7, ()) == 0


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"lengths": [8, 300]}, "beyond generate.max_new_tokens = 256"),
        ({"lengths": [0]}, "each at least 1"),
        ({"lengths": [8], "length_prompt": "{prompt}"}, "must hold"),
    ],
)
def test_settings_that_cannot_work_are_refused(env: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config.model_validate({"env": env})
