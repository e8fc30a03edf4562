"""Your own questions and answers: a file with one JSON object a line, `{"question": "…", "answer": "…"}`."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from farflung.envs import answers
from farflung.envs.base import Score, Split, Task
from farflung.envs.split import split_of
from farflung.protocol.errors import ConfigError

Match = Literal["exact", "number", "choice"]
MAX_LINE_BYTES = 256 * 1024
SHOWN_ANSWER_CHARS = 200


class Jsonl:
    """Questions from a file; the reward is 1 when the final answer matches, else 0.

    Arguments
        path       the file, UTF-8, one JSON object a line, each line at most 256 KiB; empty lines are skipped
        match      exact: what follows the last `Answer:` or `<answer>`, else the last line, is the answer letter for
                   letter; number: the last number of the reply has its value; choice: that place names its letter A–H
        question   the key under which a line has its question: text, or a list of chat messages
        answer     the key under which a line has its answer: text or a number
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
        return (task for task in self.lines if split_of(as_text(task["question"])) == split)

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
    finders = {"exact": answers.tagged, "number": answers.last_number, "choice": answers.choice}
    return finders[match](reply)


def matches(found: str, right: str, match: Match) -> bool:
    """Whether the answer found is right; nothing found is never right."""
    if match == "number":
        return answers.same_number(found, right)
    return answers.same(found, right) if match == "exact" else found != "" and found == right


def read_tasks(path: str, question: str, answer: str, match: Match, digest: Any) -> list[Task]:
    """Every distinct question of the file, each line's bytes added to `digest`; ConfigError names a bad line."""
    found: dict[str, Task] = {}
    try:
        with Path(path).open("rb") as file:
            for number, line in numbered_lines(file, path):
                digest.update(line)
                task = read_task(line, f"{path} line {number}", question, answer, match)
                known = found.setdefault(as_text(task["question"]), task)
                if known["answer"] != task["answer"]:
                    raise ConfigError(f"{path} line {number} asks an earlier question with another answer; keep one")
    except OSError as error:
        raise ConfigError(f"cannot read the questions in {path}: {error.strerror}; check the path") from error
    if not found:
        raise ConfigError(f'{path} has no questions; write lines like {{"question": "2+2?", "answer": "4"}}')
    return list(found.values())


def numbered_lines(file: BinaryIO, path: str) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of the lines that are not blank, never holding more than one."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise ConfigError(f"{path} line {number} is longer than {MAX_LINE_BYTES} bytes; shorten or remove it")
        if line.strip():
            yield number, line


def read_task(line: bytes, place: str, question: str, answer: str, match: Match) -> Task:
    """The task of one line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{place} is not a JSON object; write one object a line")
    for key in (question, answer):
        if key not in row:
            raise ConfigError(f"{place} has no {key!r}, only {sorted(row)[:8]}; rename it or set the key's name")
    return {
        "question": check_question(row[question], place),
        "answer": check_answer(row[answer], place, match),
    }


def check_question(asked: Any, place: str) -> str | list[dict[str, str]]:
    """The question if it is text or chat messages."""
    is_chat = isinstance(asked, list) and all(
        isinstance(part, dict) and set(part) == {"role", "content"} and all(isinstance(v, str) for v in part.values())
        for part in asked
    )
    if not (isinstance(asked, str) or is_chat) or not asked:
        raise ConfigError(f"{place}: the question is neither text nor a list of chat messages (role, content)")
    return asked


def check_answer(given: Any, place: str, match: Match) -> str:
    """The answer as text, in the form in which `find` would find it; ConfigError if it never could."""
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise ConfigError(f"{place}: the answer is {type(given).__name__}; write text or a number")
    text = answers.tidy(str(given))
    if match != "exact" or answers.is_marked(text):
        text = text if matches(find(text, match), text, match) else find(text, match)
    if not matches(find(text, match), text, match):
        raise ConfigError(f"{place}: no reply could match the answer {str(given)[:80]!r} as {match!r}; change either")
    return text


def as_text(question: str | list[dict[str, str]]) -> str:
    """What identifies a question."""
    return question if isinstance(question, str) else json.dumps(question, sort_keys=True)
