"""An environment of your own: reverse a word. All that farflung asks for is these five members."""

from farflung.envs.base import Score
from farflung.envs.split import split_of


class Env:
    version = "1"

    def __init__(self, words: str = "apple river stone chair tiger table green flute"):
        self.words, self.spec = words.split(), {"words": words}

    def tasks(self, split):
        return ({"word": word} for word in self.words if split_of(word) == split)

    def prompt(self, task):
        return f"Write the word {task['word']} backwards: "

    def score(self, task, transcript):
        answer = transcript.strip()
        return Score(reward=float(answer == task["word"][::-1]), answer=answer[:40])
