import json

import pytest

from farflung.envs.data_file import MAX_LINE_BYTES
from farflung.envs.jsonl import Jsonl
from farflung.envs.load import load_env
from farflung.envs.split import split_of
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
        ({"question": "2+2?", "answer": "5"}, "line 2 asks .* that of line 1, .* '5' instead of '4'"),
        ({"question": "cut \ud83d", "answer": "5"}, r"line 2 has half a character, '.ud83d'"),
        ({"question": "?", "answer": "\ude00"}, "line 2 has half a character"),
        ('{"question": "?", "answer": NaN}', "line 2 is not JSON .NaN is no number"),
        ('{"question": "?", "answer": -Infinity}', "line 2 is not JSON .-Infinity is no number"),
        ('{"question": "?", "answer": 1e999}', "line 2: the answer is inf, beyond"),
        ("question,answer", "or name a table .csv"),
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


ROWS = [{"question": f"{n} + 1 é?", "answer": str(n + 1)} for n in range(20)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
TABLE = "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.jsonl", LINES.replace("\n", "\r\n\r\n").encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.jsonl", LINES.encode("utf-16-le")),
        ("a.ndjson", LINES.encode("utf-16-be")),
        ("a.jsonl", json.dumps(ROWS).encode()),
        ("a.json", json.dumps(ROWS, indent=1).encode("utf-16")),
        ("a.csv", TABLE.encode()),
        ("a.csv", TABLE.encode("utf-8-sig")),
        ("a.CSV", TABLE.replace(",", ";").encode("utf-16")),
        ("a.tsv", TABLE.replace(",", "\t").encode()),
    ],
)
def test_forms_and_encodings_give_the_same_tasks(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert sorted(both(load_env(str(tmp_path / name))), key=lambda task: int(task["answer"])) == ROWS


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", LINES.encode() + b'\n{"question": "caf\xe9", "answer": "1"}', "line 21 is not text in UTF-8"),
        ("a.jsonl", LINES.encode("utf-16")[:-1], "not text in UTF-16"),
        ("a.json", json.dumps(ROWS).encode()[:-9], "is not JSON .* write an array of objects"),
        ("a.json", b'[{"question": "?", "answer": "1"}, 5]', "item 2 is not a JSON object"),
        ("a.csv", TABLE.encode() + b"1,000?,1\n", "line 22 has more cells than the first line has names"),
        ("a.csv", TABLE.encode() + b"what?\n", "line 22 has no 'answer'"),
        ("a.csv", TABLE.encode() + b"caf\xe9,1\n", "is not text in UTF-8"),
        ("a.csv", b"question,answer\n" + b"x" * MAX_LINE_BYTES * 2, "line 2 is no row of a table"),
        ("a.csv", b"", "has no questions"),
        ("a.csv", b"question,answer\n", "has no questions"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_place(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        load_env(str(tmp_path / name))


@pytest.mark.parametrize(
    ("row", "match", "question", "answer"),
    [
        ({"prompt": "2+2?", "completion": "4"}, "number", "2+2?", "4"),
        ({"problem": "2+2?", "solution": "2+2 is \\boxed{4}", "answer": "4"}, "exact", "2+2?", "4"),
        ({"problem": "2+2?", "solution": "so it is $\\boxed{4}$."}, "number", "2+2?", "4"),
        ({"question": "2+2?", "answer": "2+2 = <<2+2=4>>4\n#### 4"}, "number", "2+2?", "4"),
        ({"question": "2+2?", "answer": "2+2 = <<2+2=4>>4\n#### 4"}, "exact", "2+2?", "4"),
        ({"Question": "cost?", "Answer": "$1,234.50"}, "number", "cost?", "$1,234.50"),
        ({"question": "share?", "answer": "50%"}, "number", "share?", "50%"),
        ({"question": "half?", "answer": "1/2"}, "number", "half?", "1/2"),
        ({"question": "small?", "answer": 0.00001}, "number", "small?", "0.00001"),
        ({"question": "large?", "answer": 1e22}, "number", "large?", "10000000000000000000000"),
        ({"question": "which?", "answer": "J"}, "choice", "which?", "J"),
        ({"question": "which?", "answer": "(B)"}, "choice", "which?", "B"),
        ({"question": "which?", "answer": "b"}, "choice", "which?", "B"),
        ({"prompt": "q?", "completion": [{"role": "assistant", "content": "a"}]}, "exact", "q?", "a"),
    ],
)
def test_usual_keys_and_answers_are_taken(write, row, match, question, answer):
    env = Jsonl(write(row), match=match)
    (task,) = both(env)
    assert task == {"question": question, "answer": answer}
    assert env.score(task, f"Answer: {answer}").reward == 1


def test_keys_that_somebody_names_are_not_replaced(write):
    with pytest.raises(ConfigError, match=r"has no 'q', only \['answer', 'question'\]; .* env.args.question"):
        Jsonl(write({"question": "2+2?", "answer": "4"}), question="q")


def test_a_few_questions_are_in_both_splits(write):
    questions = [f"{n}?" for n in range(99) if split_of(f"{n}?") == "train"][:6]
    env = Jsonl(write(*({"question": question, "answer": 1} for question in questions)), match="number")
    assert len(list(env.tasks("eval"))) == 1
    assert len(list(env.tasks("train"))) == 5


def test_a_long_question_and_a_reply_of_half_characters_are_scored(write):
    env = Jsonl(write(json.dumps({"question": "😀" * 50_000, "answer": "4"}, ensure_ascii=False)), match="number")
    (task,) = both(env)
    assert env.prompt(task) == "😀" * 50_000
    assert env.score(task, "\ud83d Answer: \ude00 4").reward == 1
