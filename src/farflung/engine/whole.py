"""Rows of a model that has no use for a cache: every token takes a pass over the whole text, row by row.

Slow, and always right: it is what every other way is measured by.

Legend: B live rows, V vocabulary, D hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from farflung.engine.base import Request


class WholeTextBatch:
    """The same to a caller as `DecodeBatch`."""

    may_grow = True
    logits_BV: torch.Tensor

    def __init__(self, model: PreTrainedModel, _horizon: int, **_: Any) -> None:
        self._model = model
        self._texts: list[list[int]] = []

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    def join(self, requests: Sequence[Request]) -> None:
        """Rows of these requests come behind those that are here."""
        self._texts += [list(request.prompt_ids) for request in requests]
        self._say()

    def advance(self, token_B: torch.Tensor) -> None:
        """Feed one token to each row."""
        for text, token in zip(self._texts, token_B.tolist(), strict=True):
            text.append(token)
        self._say()

    def keep(self, live_B: torch.Tensor) -> None:
        """Go on with these rows; the logits are the caller's to make anew."""
        self._texts = [self._texts[row] for row in live_B.tolist()]

    def _say(self) -> None:
        logits = []
        for text in self._texts:
            out = self._model(input_ids=torch.tensor([text], device=self.device), use_cache=False)
            logits.append(out.logits[0, -1])
        self.logits_BV = torch.stack(logits)
