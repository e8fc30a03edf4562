"""How a vLLM server samples: as a stock one of today does, and in ten other ways that a worker must tell.

It computes as plainly as can be, a whole pass for every token.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from farflung.engine.noise import gumbel
from farflung.engine.seeded_rows import SEED, TEMPERATURE


@dataclass
class Flaws:
    """Settings that a server has of its own; by default none."""

    noise: str = "seeded"
    """seeded, ignored (none that repeats), another (a first runner's), watermarked, speculative (half of the time)."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    penalty: float = 0.0
    """Taken from the logits of tokens that came before."""
    head: torch.dtype = torch.float32
    keeps_prefixes: bool = False
    keeps_weights: bool = False
    """Says that it loads new weights and does not."""


@dataclass
class Sampler:
    """A model with a way to sample, and the first logits of prompts that it keeps."""

    model: Any
    flaws: Flaws = field(default_factory=Flaws)
    has_processor: bool = False
    kept: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    @torch.inference_mode()
    def generate(self, prompt: list[int], sampling: dict[str, Any], salt: str | None) -> list[tuple[int, torch.Tensor]]:
        """Each token that it sends with the log-probabilities of all (V,)."""
        said: list[tuple[int, torch.Tensor]] = []
        ids = list(prompt)
        while len(said) < sampling["max_tokens"]:
            logits = self._logits(ids, None if said else salt or "")
            token = self._pick(logits.clone(), prompt, ids, sampling)
            said.append((token, logits.log_softmax(0)))
            ids.append(token)
            if token in sampling.get("stop_token_ids", ()):
                break
        return said

    @torch.inference_mode()
    def read(self, ids: list[int]) -> torch.Tensor:
        """Log-probabilities after each token (T, V)."""
        return self.model(torch.tensor([ids])).logits[0].to(self.flaws.head).float().log_softmax(-1)

    def reset(self) -> None:
        """New weights are there: prefixes go."""
        if not self.flaws.keeps_prefixes:
            self.kept.clear()

    def _logits(self, ids: list[int], salt: str | None) -> torch.Tensor:
        """Those of the next token; a prompt without a salt is kept."""
        if salt == "" and tuple(ids) in self.kept:
            return self.kept[tuple(ids)]
        logits = self.model(torch.tensor([ids])).logits[0, -1].to(self.flaws.head).float()
        if salt == "":
            self.kept[tuple(ids)] = logits
        return logits

    def _pick(self, logits: torch.Tensor, prompt: list[int], ids: list[int], sampling: dict[str, Any]) -> int:
        flaws, extra = self.flaws, sampling.get("extra_args") or {}
        temperature, seed = sampling["temperature"], sampling.get("seed")
        if self.has_processor and SEED in extra:
            logits = logits / extra[TEMPERATURE] + gumbel([extra[SEED]], [len(ids) - 1], len(logits))[0]
        if flaws.penalty:
            logits[list(set(ids))] -= flaws.penalty
        if temperature == 0:
            return int(logits.argmax())
        logits /= flaws.temperature or temperature
        logits = _likeliest(logits, flaws.top_k or sampling["top_k"], min(flaws.top_p, sampling["top_p"]))
        return int((logits + self._noise(seed, len(prompt), ids, len(logits))).argmax())

    def _noise(self, seed: int | None, prompt: int, ids: list[int], vocab: int) -> torch.Tensor:
        match self.flaws.noise:
            case "ignored":
                rng = np.random.default_rng()
            case "another":
                rng = np.random.default_rng([seed or 0, len(ids) - prompt])
            case "watermarked":
                rng = np.random.default_rng(ids[-3:])
            case "speculative" if random.Random(f"{seed} {len(ids)}").random() < 0.5:
                rng = np.random.default_rng([seed or 0, len(ids)])
            case _:
                return gumbel([seed or 0], [len(ids) - 1], vocab)[0]
        return torch.from_numpy(rng.gumbel(size=vocab).astype(np.float32))


def _likeliest(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        chance, order = logits.softmax(0).sort(descending=True)
        is_out = chance.cumsum(0) - chance >= top_p
        logits = logits.masked_fill(torch.zeros_like(is_out).scatter(0, order, is_out), -torch.inf)
    return logits


def told(token: int, logp_V: torch.Tensor, count: int) -> dict[str, Any]:
    """A token with the likeliest ones, itself first, as the server's route gives it."""
    tops = [token, *(other for other in logp_V.topk(min(count, len(logp_V))).indices.tolist() if other != token)]
    rank_V = logp_V.argsort(descending=True).argsort() + 1
    items = [{"token_id": t, "logprob": float(logp_V[t]), "rank": int(rank_V[t])} for t in tops]
    return items[0] | {"top_logprobs": items[: max(count, 1)]}
