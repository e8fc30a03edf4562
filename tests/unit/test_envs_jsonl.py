import json

import pytest

from farflung.envs.jsonl import MAX_LINE_BYTES, Jsonl
from farflung.protocol.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write_lines(*lines):
        path = tmp_path / "questions.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return str(path)

    return write_lines


def both(env):
    return [task for split in ("train", "eval") for task in env.tasks(split)]


def test_questions_keep_their_split_whatever_the_file_holds(write):
    rows = [{"question": f"{i}+1?", "answer": i + 1} for i in range(80)]
    held_out = list(Jsonl(write(*rows), match="number").tasks("eval"))
    assert 0 < len(held_out) < 30
    assert held_out == list(Jsonl(write(*rows, {"question": "one more", "answer": 1}), match="number").tasks("eval"))


def test_duplicates_and_blank_lines_are_dropped(write):
    row = {"question": "2+2?", "answer": "4"}
    assert both(Jsonl(write(row, "", row))) == [row]


@pytest.mark.parametrize(
    ("match", "answer", "right", "wrong"),
    [
        ("exact", "Paris", "I recall.\nAnswer: Paris.", "Answer: Paris or Rome"),
        ("exact", "Paris", "Answer: paris", "Answer: Pari"),
        ("number", 1000, "it makes 1,000.0", "1000 or 1001"),
        ("choice", "B", "the answer: (B)", "A, B, C, D"),
    ],
)
def test_matching(write, match, answer, right, wrong):
    env = Jsonl(write({"question": "?", "answer": answer}), match=match)
    (task,) = both(env)
    assert env.score(task, right).reward == 1
    assert env.score(task, wrong).reward == 0
    assert env.score(task, "").reward == 0


def test_keys_and_chat_questions(write):
    chat = [{"role": "user", "content": "2+2?"}]
    env = Jsonl(write({"q": chat, "a": 4}), match="number", question="q", answer="a")
    (task,) = both(env)
    assert env.prompt(task) == chat
    assert Jsonl(**env.spec).version == env.version


def test_the_version_follows_the_content(write):
    first = Jsonl(write({"question": "a?", "answer": "b"})).version
    assert first != Jsonl(write({"question": "a?", "answer": "c"})).version


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 5000, "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ({"question": "?"}, "line 2 has no 'answer'"),
        ({"question": 5, "answer": "5"}, "neither text nor a list"),
        ({"question": "?", "answer": None}, "write text or a number"),
        ({"question": "?", "answer": "two\nlines"}, "no reply could match"),
        ({"question": "2+2?", "answer": "5"}, "another answer"),
        ({"question": "x" * MAX_LINE_BYTES, "answer": "5"}, "longer than"),
    ],
)
def test_a_bad_line_is_named(write, line, words):
    with pytest.raises(ConfigError, match=words):
        Jsonl(write({"question": "2+2?", "answer": "4"}, line))


def test_missing_and_empty_files_and_wrong_match(write, tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        Jsonl(str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="no questions"):
        Jsonl(write(""))
    with pytest.raises(ConfigError, match="choose one of exact, number, choice"):
        Jsonl(write({"question": "?", "answer": "1"}), match="regex")
