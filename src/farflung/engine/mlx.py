"""MLX as an engine: models of mlx-lm in this process, on the GPU of a Mac, or on a processor.

Each prompt is read by itself, once for all its samples, so nothing is padded while it is read; then the caches are
merged, and the rows go on together from the last token of each prompt.

Legend: B rows, V vocabulary.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.models.cache import make_prompt_cache

from farflung.engine import mlx_noise
from farflung.engine.base import Completion, Replay, Request, refuse_empty, unloaded
from farflung.engine.loading import end_tokens
from farflung.engine.mlx_model import MlxModel, in_torch
from farflung.engine.plain import complete
from farflung.engine.replay import refuse_strangers, views
from farflung.protocol.probe import Slice
from farflung.protocol.stops import Stops

PREFILL = 2048
"""Tokens of a prompt that are read at once."""


class MlxEngine:
    """One policy in this process, in MLX's arrays."""

    def __init__(
        self,
        config: Path | str | bytes,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        eos_ids: Iterable[int] | None = None,
        stops: Stops | None = None,
        max_rows: int = 64,
    ) -> None:
        """Build the architecture of a `config.json` (a folder, or the file's bytes); `load` must bring the weights.

        Raises ConfigError for a model that mlx-lm computes otherwise than transformers does.
        """
        self._device = mx.cpu if torch.device(device).type == "cpu" else mx.gpu
        os.environ["MLX_ENABLE_TF32"] = "0"  # float32 is to be that; it is read at the first product
        if self._device == mx.cpu:
            mx.disable_compile()  # which asks for a C++ compiler there
        with mx.stream(self._device):
            self._model = MlxModel(config, dtype)
        self.model = self._model.layout
        self.eos_ids = frozenset(end_tokens(self.model) if eos_ids is None else eos_ids)
        self.stops = stops
        self.max_rows = max_rows
        self.made = 0
        self._is_loaded = False

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights. After a WeightsError the engine refuses to work until a complete load succeeds."""
        self._is_loaded = False
        with mx.stream(self._device):
            self._model.load(tensors)
        mx.clear_cache()
        self._is_loaded = True

    def values(self, slices: Sequence[Slice]) -> bytes:
        """These slices of the weights as they lie in the engine, in bfloat16, the type in which they are published."""
        self._refuse_unloaded()
        with mx.stream(self._device):
            return self._model.values(slices)

    def generate(
        self, requests: Sequence[Request], should_stop: Callable[[], bool] | None = None
    ) -> list[Completion | None]:
        """Generate every request, in order, `max_rows` at a time.

        `should_stop` is asked before every token; once it says yes, incomplete ones stay None. Raises ValueError for
        ids that the model does not have.
        """
        self._refuse_unloaded()
        refuse_empty(requests)
        refuse_strangers(self.model, [(one, ()) for one in requests])
        with mx.stream(self._device):
            read, ask = partial(MlxRows, self._model.compute), partial(self._count, should_stop)
            done = complete(read, requests, self.eos_ids, ask, self.max_rows, stops=self.stops)
        mx.clear_cache()
        return done

    def replay(self, items: Sequence[tuple[Request, Sequence[int]]], *, alone: bool = False) -> list[Replay]:
        """Prefill each (request, completion ids) once, always alone, and compare each token with the seeded pick."""
        self._refuse_unloaded()
        refuse_strangers(self.model, items)
        with mx.stream(self._device):
            return [self._replay(request, ids) for request, ids in items]

    def close(self) -> None:
        """Nothing of it runs elsewhere."""

    def _replay(self, request: Request, ids: Sequence[int]) -> Replay:
        if not ids:
            return Replay(*np.zeros((5, 0), np.float32))
        text, first = (*request.prompt_ids, *ids[:-1]), request.first_position
        logits_NV = self._model.compute(mx.array([text]))[0, first:].astype(mx.float32)
        return views(in_torch(logits_NV), [(request, ids)])[0]

    def _count(self, should_stop: Callable[[], bool] | None) -> bool:
        self.made += 1
        return should_stop is not None and should_stop()

    def _refuse_unloaded(self) -> None:
        if not self._is_loaded:
            raise unloaded()


class MlxRows:
    """Rows that decode together: their caches, merged, and the logits of what is next."""

    def __init__(self, model: Any, requests: Sequence[Request]) -> None:
        """Read the prompts."""
        self._model = model
        read = {prompt: self._read(prompt) for prompt in dict.fromkeys(one.prompt_ids for one in requests)}
        layers = zip(*(read[one.prompt_ids] for one in requests), strict=True)
        self._cache = [caches[0].merge(list(caches)) for caches in layers]
        self._feed(mx.array([one.prompt_ids[-1] for one in requests]))

    def pick(self, requests: Sequence[Request], said: int) -> tuple[list[int], list[float]]:
        """The token of each row that comes after `said` ones, and its log-probability at the sampling temperature."""
        self._picked_B, logp_B = mlx_noise.pick(self._logits_BV, requests, said)
        mx.eval(self._picked_B, logp_B)
        return self._picked_B.tolist(), logp_B.tolist()

    def go_on(self, going: Sequence[int]) -> None:
        """Feed what was picked to these rows; the others end."""
        if not going:
            return
        if len(going) < self._picked_B.size:
            going_B = mx.array(going)
            self._picked_B = self._picked_B[going_B]
            for cache in self._cache:
                cache.filter(going_B)
        self._feed(self._picked_B)

    def _feed(self, token_B: mx.array) -> None:
        self._logits_BV = self._model(token_B[:, None], cache=self._cache)[:, -1]

    def _read(self, prompt: tuple[int, ...]) -> list[Any]:
        """A cache of all of a prompt but its last token; without its logits, which are not asked for."""
        cache = make_prompt_cache(self._model)
        for start in range(0, len(prompt) - 1, PREFILL):
            self._model(mx.array([prompt[start : min(start + PREFILL, len(prompt) - 1)]]), cache=cache)
            mx.eval([one.state for one in cache])
        return cache
