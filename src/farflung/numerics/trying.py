"""Trials of a model: texts longer than its windows, each compared with one plain pass over it.

A path that saves time (a shared prompt, padded rows, a cache) is right for one architecture and wrong for the next: a
mask of one's own hides no window, a recurrent state takes padding for text. So each is tried before it is taken.

Legend: T predicted tokens of a text, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

LONGEST = 512
"""Windows and chunks shorter than this are exceeded by what is tried; no row of several completions is longer."""
TAIL = 8
"""Tokens of a completion that is tried."""
FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError)
"""Errors of a model that does not take its input."""
_TOLERANCE = {torch.float32: 3e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
"""Most by which log-probabilities may be off, in their standard deviations over the vocabulary."""
_LOGP_TOLERANCE, _SHORT_LOGP_TOLERANCE = 1e-3, 0.1
"""Most nats by which the log-probabilities of a text's own tokens may be off, in float32 and in shorter types."""
_SHORT = 4
"""Positions that no rope changes because a text is longer than so many tokens."""
Mode = TypeVar("Mode")


class Text(NamedTuple):
    """A prompt and what follows it."""

    prompt: tuple[int, ...]
    tail: tuple[int, ...]


class Trial:
    """Texts with which a model is tried, and what one plain pass over each of them says."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        """Takes a pass over each text. Raises what the model raises if it takes none.

        `dtype` is what the model computes in, which decides how near is near; its own if none is given.
        """
        self.model, self.dtype, length = model, dtype or model.dtype, prompt_length(model)
        while True:
            try:
                self.texts = texts(model, length)
                with torch.no_grad():
                    self.expected = [plain_logits(model, text) for text in self.texts]
                return
            except FAULTS:  # it has no places for so many tokens and does not say so
                length //= 2
                if not length:
                    raise

    def holds(self, attempt: Callable[[Sequence[Text]], Iterable[torch.Tensor]]) -> bool:
        """Whether another way to the logits (T, V) of each text gives the same; those of fewer tokens count too."""
        return self._agrees(attempt, self.expected, is_near)

    def holds_logp(self, attempt: Callable[[Sequence[Text]], Iterable[torch.Tensor]]) -> bool:
        """Whether another way to the log-probabilities (T,) of each text's own tokens gives the same."""
        expected = [tail_logp(logits_TV, text) for logits_TV, text in zip(self.expected, self.texts, strict=True)]
        return self._agrees(attempt, expected, is_logp_near)

    def _agrees(
        self,
        attempt: Callable[[Sequence[Text]], Iterable[torch.Tensor]],
        expected: Sequence[torch.Tensor],
        is_same: Callable[[torch.Tensor, torch.Tensor, torch.dtype], bool],
    ) -> bool:
        try:
            with torch.no_grad():
                found = list(attempt(self.texts))
        except FAULTS:  # it takes no such mask, no places, or no cache
            return False
        pairs = zip(found, expected, strict=True)
        return all(is_same(one, other[: len(one)], self.dtype) for one, other in pairs)


def tried(model: PreTrainedModel, trial: Trial | None = None, dtype: torch.dtype | None = None) -> Trial | None:
    """A trial of a model, the one that is at hand if there is one; None if it takes no text."""
    try:
        return trial or Trial(model, dtype)
    except FAULTS:
        return None


def first_that_holds(ways: Sequence[Mode], holds: Callable[[Mode], bool]) -> Mode:
    """The first way that holds, for the fastest comes first; else the last, which is plain itself and is not tried."""
    return next((mode for mode in ways[:-1] if holds(mode)), ways[-1])


def plain_logits(model: PreTrainedModel, text: Text) -> torch.Tensor:
    """Logits (T, V) of each token of a completion by one pass over the whole text: no mask, no padding, no cache."""
    ids_1T = torch.tensor([text.prompt + text.tail[:-1]], device=model.device)
    return model(input_ids=ids_1T, use_cache=False).logits[0, len(text.prompt) - 1 :]


def is_near(found_TV: torch.Tensor, expected_TV: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether logits say the same but for rounding; in short types most of them, for routers may turn."""
    if found_TV.shape != expected_TV.shape:
        return False
    found_TV, expected_TV = found_TV.float().log_softmax(-1), expected_TV.float().log_softmax(-1)
    off_T = (found_TV - expected_TV).square().mean(-1).sqrt()
    off = off_T.max() if dtype == torch.float32 else off_T.median()
    return bool(off <= _TOLERANCE.get(dtype, 0.0) * expected_TV.std(-1).mean())


def tail_logp(logits_TV: torch.Tensor, text: Text) -> torch.Tensor:
    """Log-probability (T,) of each token of a completion, float32."""
    tail_T1 = torch.tensor(text.tail, device=logits_TV.device)[:, None]
    return logits_TV.float().log_softmax(-1).gather(-1, tail_T1)[:, 0]


def is_logp_near(found_T: torch.Tensor, expected_T: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether log-probabilities are the same but for rounding; in short types most of them, for routers may turn."""
    if found_T.shape != expected_T.shape:
        return False
    if dtype == torch.float32:
        return torch.allclose(found_T, expected_T, atol=_LOGP_TOLERANCE, rtol=_LOGP_TOLERANCE)
    return bool((found_T - expected_T).abs().median() <= _SHORT_LOGP_TOLERANCE)


def texts(model: PreTrainedModel, length: int) -> list[Text]:
    """Two completions of a prompt of so many tokens, one of a prompt a little shorter, and one of a short prompt."""
    vocab, draw = model.config.get_text_config().vocab_size, torch.Generator().manual_seed(0)

    def some(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab, (count,), generator=draw).tolist())

    long, middle, short = some(length), some(max(1, length - 3)), some(max(1, min(5, length - 4)))
    return [Text(prompt, some(TAIL)) for prompt in (long, long, middle, short)]


def prompt_length(model: PreTrainedModel) -> int:
    """Tokens of a prompt that exceeds what the model counts in, as far as the model has places for so many."""
    config = model.config.get_text_config()
    scale = max((number for number in whole_numbers(config) if number < LONGEST), default=0)
    places = [getattr(config, "max_position_embeddings", None), steady_tokens(model)]
    return max(1, min([scale + TAIL, *(most - TAIL for most in places if most)]))


def whole_numbers(config: PretrainedConfig) -> Iterator[int]:
    """All whole numbers of a configuration: a window, a chunk and an original length are among them."""
    waiting: list[Any] = [config.to_dict()]
    while waiting:
        match waiting.pop():
            case dict() as fields:
                waiting += fields.values()
            case list() | tuple() as fields:
                waiting += fields
            case bool():
                continue
            case int() as number:
                yield number


def remembers_all(config: PretrainedConfig) -> bool:
    """Whether a model looks back at every token of a row of several completions: no shorter window, no state.

    Told by what it would have a cache remember. Weights that are nearly nothing may hide either from being tried.
    """
    try:
        layers = DynamicCache(config=config).layers
    except FAULTS:
        return False
    return all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= LONGEST)
        for layer in layers
    )


# --- rope that depends on the length of a text -----------------------------------------------------------------------


def steady_tokens(model: PreTrainedModel) -> int | None:
    """Most tokens of a text up to which a position is rotated the same however long the text is; None for no limit.

    Beyond it keys that were cached, and rows of other lengths, have other rotations than a pass over the whole text.
    """
    longest = max(whole_numbers(model.config.get_text_config()), default=0)
    limits = [_steady(turn, longest) for module in model.modules() if _is_rope(module) for turn in _turns(module)]
    return min((limit for limit in limits if limit is not None), default=None)


def _is_rope(module: torch.nn.Module) -> bool:
    return hasattr(module, "config") and any(
        name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)
    )


def _turns(module: torch.nn.Module) -> Iterator[Callable[[int], torch.Tensor]]:
    """Functions that give the rotation of the first positions in a text of so many tokens, for each kind of layer."""
    kinds = [{"layer_type": kind} for kind in set(getattr(module.config, "layer_types", None) or ())]
    device = next(module.buffers()).device

    def turn(tokens: int, **kind: str) -> torch.Tensor:
        place_1T = torch.tensor([[*range(_SHORT), tokens - 1]], device=device)
        found = module(torch.zeros(1, _SHORT + 1, 1, device=device), place_1T, **kind)
        return torch.cat([part[..., :_SHORT, :].float() for part in found])

    for kind in [{}, *kinds]:
        try:
            turn(_SHORT, **kind)
        except FAULTS:  # it has no such kind, or is asked otherwise
            continue
        yield lambda tokens, kind=kind: turn(tokens, **kind)


def _steady(turn: Callable[[int], torch.Tensor], longest: int) -> int | None:
    """The most tokens for which rotations stay, if they change at all up to one more than `longest`."""
    short = turn(_SHORT)

    def changes(tokens: int) -> bool:
        return not torch.equal(turn(tokens), short)

    low, high = _SHORT, longest + 1
    if high <= low or not changes(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if changes(middle) else (middle, high)
    turn(_SHORT)  # some remember the longest text that they were asked about
    return low
