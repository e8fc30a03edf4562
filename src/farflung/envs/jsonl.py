"""Your own questions and answers: a file of rows such as `{"question": "…", "answer": "…"}`, one a line."""

import hashlib
import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, Literal, get_args

from farflung.envs import answers, data_file
from farflung.envs.base import Score, Split, Task
from farflung.envs.split import divided
from farflung.protocol.errors import ConfigError

Match = Literal["exact", "number", "choice"]
QUESTIONS = ("question", "prompt", "problem", "input", "instruction", "query")
ANSWERS = ("answer", "final_answer", "expected_answer", "ground_truth", "target", "label")
ANSWERS += ("solution", "completion", "response", "output")
"""Keys that data sets have their questions and answers under, the first one that a row has is taken."""
MAX_TASK_BYTES = 450_000
"""A task goes to the coordinator twice in one line, as itself and as its prompt."""
SHOWN_ANSWER_CHARS = 200
SHOWN_CHARS = 80


class Jsonl:
    """Questions from a file; the reward is 1 when the final answer matches, else 0.

    Arguments
        path       the file: JSON lines, a JSON array, or a table (.csv, .tsv) whose first line names its columns; UTF-8
                   or UTF-16, each row at most 256 KiB; empty lines are skipped
        match      exact: what the last `Answer:`, `<answer>`, `\\boxed{}` or `####` names, else the last line, is the
                   answer whatever its case and spacing; number: the number there, else the last of the reply, has its
                   value; choice: that place names its letter A-Z
        question   the key under which a row has its question: text, or a list of chat messages
        answer     the key under which a row has its answer: text or a number
    """

    def __init__(self, path: str, match: Match = "exact", question: str = "question", answer: str = "answer") -> None:
        if match not in get_args(Match):
            raise ConfigError(f"{path}: match = {match!r}; choose one of {', '.join(get_args(Match))}")
        self.match = match
        self.spec: dict[str, Any] = {"path": str(path), "match": match, "question": question, "answer": answer}
        digest = hashlib.sha256()
        self.lines = read_tasks(path, question, answer, match, digest)
        self.version = f"2+{digest.hexdigest()[:16]}"

    def tasks(self, split: Split) -> Iterator[Task]:
        """Yield the distinct questions of the split in the order of the file."""
        splits = divided([as_text(task["question"]) for task in self.lines])
        return (task for task, of in zip(self.lines, splits, strict=True) if of == split)

    def prompt(self, task: Task) -> str | list[dict[str, str]]:
        """The question as the file has it."""
        return task["question"]

    def score(self, task: Task, transcript: str) -> Score:
        """Compare the one answer found with the file's."""
        found = find(transcript, self.match)
        is_right = matches(found, task["answer"], self.match)
        return Score(reward=float(is_right), parts={"answered": float(bool(found))}, answer=found[:SHOWN_ANSWER_CHARS])


def find(reply: str, match: Match) -> str:
    """The final answer of a reply, "" if there is none."""
    finders = {"exact": answers.tagged, "number": answers.last_number, "choice": answers.chosen_option}
    return finders[match](reply)


def matches(found: str, right: str, match: Match) -> bool:
    """Whether the answer found is right; nothing found is never right."""
    if match == "number":
        return answers.same_number(found, right)
    return answers.same(found, right) if match == "exact" else found != "" and found == right


def read_tasks(path: str, question: str, answer: str, match: Match, digest: Any) -> list[Task]:
    """Every distinct question of the file, each row's bytes added to `digest`; ConfigError names a bad row."""
    found: dict[str, tuple[Task, str]] = {}
    keys: tuple[str, str] | None = None
    for place, data, row in data_file.read_rows(path):
        digest.update(data)
        if not isinstance(row, dict):
            raise ConfigError(f"{place} is not a JSON object; write one object a line")
        keys = keys or (key_in(row, question, QUESTIONS), key_in(row, answer, ANSWERS))
        task = read_task(row, place, *keys, match)
        known, before = found.setdefault(as_text(task["question"]), (task, place))
        if known["answer"] != task["answer"]:
            raise ConfigError(
                f"{place} asks an earlier question, that of {before.removeprefix(path).strip()}, with another answer: "
                f"{shown(task['answer'])} instead of {shown(known['answer'])}; keep one"
            )
    if not found:
        raise ConfigError(f'{path} has no questions; write lines like {{"question": "2+2?", "answer": "4"}}')
    return [task for task, _ in found.values()]


def key_in(row: dict[str, Any], key: str, known: tuple[str, ...]) -> str:
    """The key under which the first row has its question or answer: the one asked for, else another of the usual."""
    if key in row or key != known[0]:
        return key
    by_name = {name.casefold(): name for name in reversed(row)}
    return next((by_name[name] for name in known if name in by_name), key)


def read_task(row: dict[str, Any], place: str, question: str, answer: str, match: Match) -> Task:
    """The task of one row."""
    for key, argument in ((question, "question"), (answer, "answer")):
        if key not in row:
            raise ConfigError(
                f"{place} has no {key!r}, only {sorted(map(str, row))[:8]}; rename one, or set env.args.{argument}"
            )
    task = {"question": check_question(row[question], place), "answer": check_answer(row[answer], place, match)}
    if len(json.dumps(task, ensure_ascii=False).encode()) > MAX_TASK_BYTES:
        raise ConfigError(f"{place} is longer than {data_file.MAX_LINE_BYTES} bytes; shorten or remove it")
    return task


def check_question(asked: Any, place: str) -> str | list[dict[str, str]]:
    """The question if it is text or chat messages."""
    is_chat = isinstance(asked, list) and all(
        isinstance(part, dict) and set(part) == {"role", "content"} and all(isinstance(v, str) for v in part.values())
        for part in asked
    )
    if not (isinstance(asked, str) or is_chat) or not asked:
        raise ConfigError(f"{place}: the question is neither text nor a list of chat messages (role, content)")
    check_text(as_text(asked) if isinstance(asked, str) else "".join(part["content"] for part in asked), place)
    return asked


def check_text(text: str, place: str) -> None:
    """Raise ConfigError for half of a surrogate pair, which is no character and can be written nowhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ConfigError(f"{place} has half a character, {half}, where text was cut; write the whole one") from error


def check_answer(given: Any, place: str, match: Match) -> str:
    """The answer as text, in the form in which `find` would find it; ConfigError if it never could."""
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], dict):
        given = given[0].get("content")  # a completion as chat messages
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise ConfigError(f"{place}: the answer is {type(given).__name__}; write text or a number")
    if isinstance(given, float) and not math.isfinite(given):
        raise ConfigError(f"{place}: the answer is {given}, beyond what a number can hold; write it as text")
    text = answers.tidy(plain(given))
    check_text(text, place)
    if match != "exact" or answers.is_marked(text):
        text = text if matches(find(text, match), text, match) else find(text, match)
    if not matches(find(text, match), text, match):
        raise ConfigError(f"{place}: no reply could match the answer {shown(plain(given))} as {match!r}; change either")
    return text


def plain(given: str | float) -> str:
    """The answer as text; a number without an exponent."""
    text = str(given)
    return text if isinstance(given, str) or "e" not in text else format(Decimal(text), "f")


def shown(text: str) -> str:
    """The text for a message."""
    return repr(text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…")


def as_text(question: str | list[dict[str, str]]) -> str:
    """The text that identifies a question."""
    return question if isinstance(question, str) else json.dumps(question, sort_keys=True)
