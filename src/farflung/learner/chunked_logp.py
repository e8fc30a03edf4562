"""Log-probabilities and entropies straight from hidden states: the logits exist in slices only, backwards too.

Legend: N trained tokens, S tokens of a slice, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from farflung.numerics.devices import blocks

_PROBABILITIES_KEPT = 1 << 26
"""Probabilities that are kept for the backward pass (256 MiB); of more tokens they are computed again."""


def token_logp(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    token_N: torch.Tensor,
    temperature_N: torch.Tensor,
    rounding_VD: torch.Tensor | None = None,
    *,
    is_entropy_trained: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden W' + b) / T at each token, and the entropy of each distribution in nats; float32 (N,) each.

    Both have gradients, the entropy only where it is asked for, which costs a pass over the scores. The product is
    taken in the type of `hidden_ND`, with W as it is rounded if that is given, everything after it in float32.
    """
    return _TokenLogp.apply(hidden_ND, weight_VD, bias_V, token_N, temperature_N, rounding_VD, is_entropy_trained)


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        token_N: torch.Tensor,
        temperature_N: torch.Tensor,
        rounding_VD: torch.Tensor | None,
        is_entropy_trained: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logp_N, entropy_N = torch.empty(2, len(token_N), device=hidden_ND.device)
        is_kept = any(ctx.needs_input_grad) and len(token_N) * len(weight_VD) <= _PROBABILITIES_KEPT
        ctx.kept = [] if is_kept else None
        ctx.cast_VD = cast_VD = weight_VD.to(hidden_ND.dtype) if rounding_VD is None else rounding_VD
        for part in _slices(len(token_N), weight_VD):
            score_SV = _log_softmax(hidden_ND[part], cast_VD, bias_V, temperature_N[part])
            logp_N[part] = score_SV.gather(1, token_N[part, None])[:, 0]
            pick_SV = score_SV.exp()
            entropy_N[part] = -torch.linalg.vecdot(pick_SV, score_SV)
            if ctx.kept is not None:
                ctx.kept.append(pick_SV)
        ctx.set_materialize_grads(False)
        if not is_entropy_trained:
            ctx.mark_non_differentiable(entropy_N)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, token_N, temperature_N, entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, token_N, temperature_N, entropy_N = ctx.saved_tensors
        of_logp_N, of_entropy_N = grads
        if of_logp_N is None:
            of_logp_N = torch.zeros_like(entropy_N)
        cast_VD = ctx.cast_VD
        of_hidden_ND = torch.empty_like(hidden_ND)
        of_weight_VD: torch.Tensor | None = None
        of_bias_V = torch.zeros_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        for number, part in enumerate(_slices(len(token_N), weight_VD)):
            if ctx.kept is None:
                pick_SV = _log_softmax(hidden_ND[part], cast_VD, bias_V, temperature_N[part]).exp_()
            else:
                pick_SV, ctx.kept[number] = ctx.kept[number], None
            of_entropy_S = None if of_entropy_N is None else of_entropy_N[part]
            of_score_SV = _of_scores(pick_SV, token_N[part], of_logp_N[part], of_entropy_S, entropy_N[part])
            of_logits_SV = of_score_SV.div_(temperature_N[part, None]).to(hidden_ND.dtype)
            of_hidden_ND[part] = of_logits_SV @ cast_VD
            if ctx.needs_input_grad[1]:
                more_VD = (of_logits_SV.t() @ hidden_ND[part]).float()
                of_weight_VD = more_VD if of_weight_VD is None else of_weight_VD.add_(more_VD)
            if of_bias_V is not None:
                of_bias_V += of_logits_SV.float().sum(0)
        of_weight_VD = None if of_weight_VD is None else of_weight_VD.to(weight_VD.dtype)
        return of_hidden_ND, of_weight_VD, of_bias_V, None, None, None, None


def _log_softmax(
    hidden_SD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, temperature_S: torch.Tensor
) -> torch.Tensor:
    logits_SV = F.linear(hidden_SD, weight_VD).float()
    if bias_V is not None:
        logits_SV += bias_V
    return logits_SV.div_(temperature_S[:, None]).log_softmax(1)


def _of_scores(
    pick_SV: torch.Tensor,
    token_S: torch.Tensor,
    of_logp_S: torch.Tensor,
    of_entropy_S: torch.Tensor | None,
    entropy_S: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the scores, in the place of `pick_SV`.

    d log p(token) / d score_v = [v = token] - p_v;  d entropy / d score_v = -p_v (log p_v + entropy).
    """
    of_token_S1 = of_logp_S[:, None]
    if of_entropy_S is None:
        return pick_SV.mul_(-of_token_S1).scatter_add_(1, token_S[:, None], of_token_S1)
    pull_SV = pick_SV.clamp_min(torch.finfo(torch.float32).tiny).log_().add_(entropy_S[:, None])
    pull_SV.mul_(of_entropy_S[:, None]).add_(of_token_S1)
    return pick_SV.mul_(pull_SV.neg_()).scatter_add_(1, token_S[:, None], of_token_S1)


def _slices(tokens: int, weight_VD: torch.Tensor) -> Iterator[slice]:
    height = max(1, blocks(weight_VD.device).head_logits // len(weight_VD))
    for start in range(0, tokens, height):
        yield slice(start, min(start + height, tokens))
