"""Length budgets: the prompt names a length, and the reward may ask for obedience to it. Pure.

As in INTELLECT-2 (arXiv:2505.07291, section 3.1.2, after L1, arXiv:2503.04697):
r = task reward - weight * |target - length|, in tokens, the end token included.
"""

import hashlib
from collections.abc import Sequence

Prompt = str | list[dict[str, str]]


def target_of(payload: bytes, seed: int, lengths: Sequence[int]) -> int:
    """The length that a task is told, the same whenever it is asked; 0 if there are none to choose from."""
    if not lengths:
        return 0
    drawn = hashlib.sha256(b"farflung length %d " % seed + payload).digest()
    return lengths[int.from_bytes(drawn[:8], "big") % len(lengths)]


def tell(prompt: Prompt, target: int, template: str) -> Prompt:
    """A prompt that names its target; of chat messages the last one does. Without a target, the prompt itself."""
    if not target:
        return prompt
    if isinstance(prompt, str):
        return template.replace("{tokens}", str(target)).replace("{prompt}", prompt)
    last = prompt[-1]
    return [*prompt[:-1], last | {"content": str(tell(last["content"], target, template))}]


def penalty(tokens: int, target: int, weight: float) -> float:
    """The deduction from the reward of a completion of so many tokens; 0 without a target."""
    return weight * abs(target - tokens) if target else 0.0
