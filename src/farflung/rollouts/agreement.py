"""Trainer, before it publishes: do generation, replay and the learner agree with a plain pass over the model?

Each of them takes the fastest way that holds for the model (`engine/ways.py`, `learner/forward.py`). Where they still
differ honest nodes would be ejected for the model's sake, so the run does not begin.

Legend: N tokens of one rollout, T predicted tokens of a text, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from farflung.engine.base import Completion, Request
from farflung.engine.local import LocalEngine, refuse_unsteady
from farflung.engine.ways import Ways
from farflung.learner.forward import Kind, find_kind
from farflung.learner.pack import Rollout, Segment
from farflung.numerics.trying import FAULTS, TAIL, Text, Trial, plain_logits, tail_logp
from farflung.protocol.errors import ConfigError
from farflung.rollouts.stale import behaviour

TEMPERATURES = (1.0, 0.7)
_MOST_OFF = {torch.float32: (1.0, 0.02), torch.bfloat16: (0.9, 0.25), torch.float16: (0.9, 0.1)}
"""The share of all tokens that must be near, and nats that are near; in short types a router may turn now and then."""
_TOKENS = 4096
_WHAT_TO_DO = "take another base model, one in which a token follows from the tokens before it alone"


class Agreement(NamedTuple):
    """The ways chosen for a model."""

    ways: Ways
    kind: Kind

    def __str__(self) -> str:
        ways, kind = self.ways, self.kind
        return (
            f"decoding={ways.batching} attention={'products' if ways.is_plain else 'own'} replay={ways.reading} "
            f"learner={'shared' if kind.can_share else 'padded' if kind.can_pad else 'alone'} "
            f"head={'linear' if kind.has_linear_head else 'own'} tokens={ways.most_tokens or 'any'}"
        )


def agree(engine: LocalEngine) -> Agreement:
    """Try a model, whose weights the engine holds. Raises ConfigError with what disagrees and what to do."""
    versions = _versions(engine)
    try:
        found = _compared(engine)
    except FAULTS as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"this model cannot be generated with and replayed here ({reason}); {_WHAT_TO_DO}") from error
    if _versions(engine) != versions:
        raise ConfigError(f"this model changes its own weights as it runs, so no node can hold them; {_WHAT_TO_DO}")
    return found


def _compared(engine: LocalEngine) -> Agreement:
    model, trial = engine.model, Trial(engine.model)
    ways, kind = engine.find_ways(trial), find_kind(model, trial)
    asked = [Request(text.prompt, seed, TEMPERATURES[seed % 2], TAIL) for seed, text in enumerate(trial.texts)]
    said = [one for one in engine.generate(asked) if one is not None]
    replays = engine.replay([(request, one.ids) for request, one in zip(asked, said, strict=True)])
    found = {"generation": [np.array(one.logp) for one in said], "replay": [one.logp for one in replays]}
    found["the learner"] = _learned(engine, asked, said)
    plain = list(_plain(engine, asked, said))
    for name, logp in found.items():
        off = [np.abs(one - other) for one, other in zip(logp, plain, strict=True)]
        _refuse_far(model.dtype, f"{name} and one plain pass over the same text", off)
    _refuse_far(model.dtype, "generation and the picks of its replay", [replay.margin for replay in replays])
    return Agreement(ways, kind)


def refuse_long(agreement: Agreement, tokens: int) -> None:
    """Raise ConfigError if a run's longest text is longer than the model agrees with itself."""
    refuse_unsteady(agreement.ways.most_tokens, tokens)


def _learned(engine: LocalEngine, asked: Sequence[Request], said: Sequence[Completion]) -> list[np.ndarray]:
    rollouts = [
        Rollout((Segment("prompt", request.prompt_ids), Segment("model", one.ids)), 1.0, request.temperature)
        for request, one in zip(asked, said, strict=True)
    ]
    found = behaviour(engine.model, rollouts, range(len(rollouts)), _TOKENS)
    return [found[index].numpy() for index in range(len(rollouts))]


@torch.inference_mode()
def _plain(engine: LocalEngine, asked: Sequence[Request], said: Sequence[Completion]) -> Iterator[np.ndarray]:
    for request, one in zip(asked, said, strict=True):
        text = Text(request.prompt_ids, one.ids)
        yield tail_logp(plain_logits(engine.model, text).float() / request.temperature, text).cpu().numpy()


def _refuse_far(dtype: torch.dtype, which: str, off: Sequence[np.ndarray]) -> None:
    share, near = _MOST_OFF[dtype]
    far = float(np.quantile(np.concatenate(off), share, method="higher"))
    if not far <= near:
        raise ConfigError(
            f"with this model {which} disagree by {far:.3g} nats where {near:g} is rounding, so honest nodes would be "
            f"ejected; {_WHAT_TO_DO}"
        )


def _versions(engine: LocalEngine) -> int:
    """A number that grows with every change of the weights."""
    return sum(parameter._version for parameter in engine.model.parameters())
