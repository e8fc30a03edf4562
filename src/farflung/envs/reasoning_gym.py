"""Procedural tasks of the reasoning-gym package, those that are safe: deterministic, and judged by our own comparison.

Its `score_answer` is never called: for several tasks it runs the model's text as Python, for others it pays for junk.
"""

import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import partial
from typing import Any

from farflung.envs import answers
from farflung.envs.base import Score, Split, Task
from farflung.envs.split import number_of, split_of
from farflung.protocol.errors import ConfigError

NUMERIC = frozenset(
    {
        "basic_arithmetic",
        "chain_sum",
        "decimal_chain_sum",
        "simple_equations",
        "number_sequence",
        "gcd",
        "lcm",
        "products",
        "count_bits",
        "count_primes",
        "letter_counting",
        "leg_counting",
    }
)
TEXTUAL = frozenset(
    {
        "number_filtering",
        "caesar_cipher",
        "base_conversion",
        "calendar_arithmetic",
        "family_relationships",
        "syllogism",
        "word_sequence_reversal",
        "bitwise_arithmetic",
        "dice",
        "cryptarithm",
    }
)
ALLOWED = NUMERIC | TEXTUAL

SUFFIX: dict[answers.Place, str] = {
    "last_number": "Answer with only the number.",
    "tag": "End with a line that holds only your final answer, like this:\nAnswer: ...",
    "exact": "Reply with the answer and nothing else.",
}
MAPPING = re.compile(r"([A-Z])\s*=\s*([0-9])")
SHOWN_ANSWER_CHARS = 200


class ReasoningGym:
    """One reasoning-gym task as an environment; the reward is 1 for the right final answer, else 0, but see `digits`.

    Arguments
        name      one of `ALLOWED`
        config    the task's own settings, such as {"min_digits": 1, "max_digits": 2}; not `seed` or `size`
        size      items drawn, for both splits together and before duplicates are dropped
        answer    where the answer stands, see `answers.Place`; by default the last number for tasks that ask for one
        suffix    what the prompt adds to the question
        chat      whether the prompt is chat messages, else plain text
        digits    what a wrong whole number earns in training if its sign and all but all of its digits are right, less
                  for fewer; held-out tasks are judged right or wrong
    """

    version = "2"

    def __init__(
        self,
        name: str,
        config: dict[str, Any] | None = None,
        size: int = 20_000,
        answer: answers.Place | None = None,
        suffix: str | None = None,
        chat: bool = True,
        digits: float = 0.0,
    ) -> None:
        self.name, self.config, self.size, self.chat = check_name(name), dict(config or {}), size, chat
        self.place = answer or ("last_number" if name in NUMERIC else "tag")
        if self.place not in SUFFIX:
            raise ConfigError(f"reasoning_gym: answer = {answer!r}; choose one of {', '.join(SUFFIX)}")
        self.suffix = SUFFIX[self.place] if suffix is None else suffix
        self.digits = digits
        if not 0 <= digits < 1:
            raise ConfigError(f"reasoning_gym: digits = {digits!r}; a wrong answer earns at least 0 and less than 1")
        self.spec: dict[str, Any] = {
            "name": name,
            "config": self.config,
            "size": size,
            "answer": self.place,
            "suffix": self.suffix,
            "chat": chat,
            "digits": digits,
        }
        self.items = open_dataset(name, self.config, size)

    def tasks(self, split: Split) -> Iterator[Task]:
        """Yield the distinct questions of the split in the order in which they were drawn."""
        seen: set[str] = set()
        for index in range(self.size):
            item = self.items[index]
            if item["question"] not in seen and split_of(item["question"]) == split:
                seen.add(item["question"])
                graded = {"graded": True} if self.digits and split == "train" else {}
                yield as_task(self.name, item) | graded

    def prompt(self, task: Task) -> str | list[dict[str, str]]:
        """The question and the suffix, as one user message or as plain text."""
        text = f"{task['question'].strip()}\n{self.suffix}".strip()
        return [{"role": "user", "content": text}] if self.chat else text

    def score(self, task: Task, transcript: str) -> Score:
        """Reward 1 if the answer found is the item's own, or solves its puzzle where several answers are right."""
        found = answers.find(transcript, self.place)
        is_right = solves(task["puzzle"], found) if "puzzle" in task else answers.same(found, task["answer"])
        reward = 1.0 if is_right else self._partial_credit(task, found)
        return Score(reward=reward, parts={"answered": float(bool(found))}, answer=found[:SHOWN_ANSWER_CHARS])

    def _partial_credit(self, task: Task, found: str) -> float:
        return self.digits * answers.digits_right(found, task["answer"]) if task.get("graded") else 0.0


def check_name(name: str) -> str:
    """The name, or ConfigError with the nearest task that is allowed."""
    if name in ALLOWED:
        return name
    nearest = get_close_matches(name, ALLOWED, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"choose one of {', '.join(sorted(ALLOWED))}"
    raise ConfigError(f"reasoning_gym has no task {name!r} on our list of safe ones; {hint}")


def open_dataset(name: str, config: dict[str, Any], size: int) -> Any:
    """The task's dataset, under a seed hashed from name and settings: item i of seed s is item i-1 of seed s+1."""
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise ConfigError("the reasoning_gym tasks need an extra: pip install 'farflung[envs]'") from error
    seed = number_of("reasoning_gym", name, json.dumps(config, sort_keys=True)) % 2**31
    make = partial(create_dataset, name, seed=seed, size=size)
    try:
        return make(**config)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"reasoning_gym:{name} refuses config {config}: {error}") from error


def as_task(name: str, item: dict[str, Any]) -> Task:
    """Of an item, what prompt and score need."""
    task: Task = {"question": item["question"], "answer": item["answer"]}
    if name == "cryptarithm":
        puzzle = item["metadata"]
        task["puzzle"] = {
            "words": ["".join(word) for word in puzzle["words_letters"]],
            "total": "".join(puzzle["result_letters"]),
            "zero_leads": bool(puzzle.get("allow_leading_zero", False)),
        }
    return task


def solves(puzzle: dict[str, Any], answer: str) -> bool:
    """Whether `A=1,B=2,…` names each letter of the puzzle once, each with its own digit, and the sum comes out."""
    pairs = [MAPPING.fullmatch(part.strip()) for part in answer.split(",", 10)]
    digit = {pair[1]: pair[2] for pair in pairs if pair}
    letters = set("".join(puzzle["words"])) | set(puzzle["total"])
    if len(pairs) != len(letters) or set(digit) != letters or len(set(digit.values())) != len(letters):
        return False
    *addends, total = ["".join(digit[letter] for letter in word) for word in [*puzzle["words"], puzzle["total"]]]
    has_leading_zero = any(number.startswith("0") for number in [*addends, total])
    return sum(map(int, addends)) == int(total) and (puzzle["zero_leads"] or not has_leading_zero)
