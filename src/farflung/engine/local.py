"""The embedded engine: any Hugging Face causal LM, generation and replay in this process, no compiler needed."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from farflung.engine import plain
from farflung.engine.base import Completion, Replay, Request, refuse_empty, unloaded
from farflung.engine.cpu import decode as cpu
from farflung.engine.cpu.matmul import optimise_linears
from farflung.engine.loading import build, end_tokens, load_strictly, read_slices
from farflung.engine.replay import REPLAY_TOKENS, replay
from farflung.engine.ways import Ways, find_ways, is_for_cpu, is_whole_on_cpu
from farflung.numerics.trying import Trial
from farflung.protocol.errors import ConfigError
from farflung.protocol.probe import Slice
from farflung.protocol.stops import Stops


class LocalEngine:
    """One policy in this process. No cache outlives a call, so weights loaded between calls are all that counts."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_ids: Iterable[int] | None = None,
        stops: Stops | None = None,
        max_rows: int = 64,
        replay_tokens: int = REPLAY_TOKENS,
    ) -> None:
        """Take a model with its weights. `max_rows` bounds a decoding batch, `replay_tokens` a prefill."""
        self.model = model.eval().requires_grad_(False)
        if is_whole_on_cpu(model):
            optimise_linears(model)
        self.eos_ids = frozenset(end_tokens(model) if eos_ids is None else eos_ids)
        self.stops = stops
        self.max_rows = max_rows
        self.replay_tokens = replay_tokens
        self.made = 0
        self._is_loaded = True
        self._ways: Ways | None = None

    @classmethod
    def from_folder(
        cls,
        config: Path | str | bytes,
        *,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        device: torch.device | str = "cpu",
        eos_ids: Iterable[int] | None = None,
        stops: Stops | None = None,
        max_rows: int = 64,
        replay_tokens: int = REPLAY_TOKENS,
    ) -> "LocalEngine":
        """Build the architecture of a `config.json` (a folder, or the file's bytes); `load` must bring the weights.

        Sets this process's number of torch threads. Raises ConfigError.
        """
        torch.set_num_threads(threads)
        model = build(config, dtype, device)
        engine = cls(model, eos_ids=eos_ids, stops=stops, max_rows=max_rows, replay_tokens=replay_tokens)
        engine._is_loaded = False
        return engine

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights. After a WeightsError the engine refuses to work until a complete load succeeds."""
        self._is_loaded = False
        load_strictly(self.model, tensors)
        self._is_loaded = True

    def values(self, slices: Sequence[Slice]) -> bytes:
        """These slices of the weights as they lie in the engine, in bfloat16, the type in which they are published."""
        self._refuse_unloaded()
        return read_slices(self.model.state_dict(), slices)

    @property
    def ways(self) -> Ways:
        """How this model is decoded and replayed; tried at the first call, with the weights that are there then."""
        return self._ways or self.find_ways()

    @torch.inference_mode()
    def find_ways(self, trial: Trial | None = None) -> Ways:
        """Try it with the weights that are there now, by a trial that is at hand if one is given."""
        self._refuse_unloaded()
        self._ways = find_ways(self.model, trial)
        return self._ways

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], should_stop: Callable[[], bool] | None = None
    ) -> list[Completion | None]:
        """Generate every request, in order, `max_rows` at a time: as some end, others join.

        `should_stop` is asked before every token; once it says yes, incomplete ones stay None. Raises ConfigError
        for texts in which the model's rotations would depend on their length.
        """
        self._refuse_unloaded()
        refuse_empty(requests)
        if not requests:
            return []
        ways = self.ways
        refuse_unsteady(ways.most_tokens, max(len(one.prompt_ids) + one.max_new_tokens for one in requests))
        asked = self.model, requests, self.eos_ids, partial(self._count, should_stop)
        if is_for_cpu(self.model, ways.batching):
            return cpu.decode(*asked, ways.is_plain, self.max_rows, ways.batching, self.stops)
        return plain.decode(*asked, self.max_rows, ways.batching, self.stops)

    @torch.inference_mode()
    def replay(self, items: Sequence[tuple[Request, Sequence[int]]], *, alone: bool = False) -> list[Replay]:
        """Prefill each (request, completion ids) once and compare each token with the seeded pick."""
        self._refuse_unloaded()
        return replay(self.model, items, self.replay_tokens, "alone" if alone else self.ways.reading)

    def close(self) -> None:
        """Nothing of it runs elsewhere."""

    def _count(self, should_stop: Callable[[], bool] | None) -> bool:
        self.made += 1
        return should_stop is not None and should_stop()

    def _refuse_unloaded(self) -> None:
        if not self._is_loaded:
            raise unloaded()


def refuse_unsteady(most_tokens: int | None, tokens: int) -> None:
    """Raise ConfigError for a text so long that the answers from before it was that long no longer hold."""
    if most_tokens is not None and tokens - 1 > most_tokens:
        raise ConfigError(
            f"this model's rope depends on the length of a text beyond {most_tokens} tokens, so no replay of a text of "
            f"{tokens} can agree with its generation; shorten prompts and generate.max_new_tokens, or give config.json "
            "a rope that is the same for every length (rope_type yarn, linear or default)"
        )
