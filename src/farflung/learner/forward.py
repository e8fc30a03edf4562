"""One forward pass of a causal LM over a packed micro-batch, as far as the log-probabilities of its trained tokens.

What a model can do is found by trying it on a handful of tokens, not by its name: whether its logits are a linear map
of its last hidden state, and whether it obeys an attention mask that keeps completions in one row apart.

Legend: B rollouts, T positions of completions, R rows of W tokens, N trained tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from farflung.learner.head import token_logp
from farflung.learner.mixed import rounding_of
from farflung.learner.pack import ROW_TOKENS, MicroBatch, Rollout, Rows, Segment, pack

_LOGITS_AT_ONCE = 1 << 25
"""float32 logits held at once (128 MiB), where the model's own head makes them: more are softmaxed in slices."""
_PLAIN_SCORES = 1 << 17
"""Scores of one head up to which attention in bfloat16 is taken by plain products on a CPU. For rows of 60 to 140
tokens torch's flash kernel takes 3 ms a layer backwards; a step of SmolLM2 takes 3.3 instead of 4.7 s without it."""
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Kind:
    """What is known of a model's architecture."""

    has_linear_head: bool
    can_share: bool


def find_kind(model: PreTrainedModel) -> Kind:
    """Try the model on a few tokens, in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            has_linear_head = _has_linear_head(model)
            return Kind(has_linear_head, _can_share(model, has_linear_head))
    finally:
        model.train(was_training)


def logp_entropy_BT(
    model: PreTrainedModel, micro: MicroBatch, kind: Kind, autocast: Callable[[], AbstractContextManager[None]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits / T) of each trained token and the entropy of its distribution, float32 (B, T), 0 off mask.

    Prompts and padding cost the output head nothing.
    """
    micro = micro.to(model.device)
    token_N = micro.token_BT[micro.mask_BT]
    temperature_N = micro.temperature_B[:, None].expand_as(micro.mask_BT)[micro.mask_BT]
    if kind.has_linear_head:
        head = model.get_output_embeddings()
        with autocast():
            hidden_ND = _hidden(model, micro.rows).flatten(0, 1)[micro.rows.predictor_N]
            rounding_VD = None
            if torch.is_autocast_enabled(model.device.type):
                hidden_ND = hidden_ND.to(torch.get_autocast_dtype(model.device.type))
                rounding_VD = rounding_of(head)
        logp_N, entropy_N = token_logp(hidden_ND, head.weight, head.bias, token_N, temperature_N, rounding_VD)
    else:
        with autocast():
            logits_NV = _own_logits(model, micro.rows)
        logp_N, entropy_N = _sliced_logp(logits_NV, token_N, temperature_N)
    zeros_BT = torch.zeros(micro.mask_BT.shape, device=model.device)
    return zeros_BT.masked_scatter(micro.mask_BT, logp_N), zeros_BT.masked_scatter(micro.mask_BT, entropy_N)


def _fed(rows: Rows) -> dict[str, torch.Tensor]:
    fed = {"input_ids": rows.ids_RW}
    return fed if rows.is_plain else fed | {"attention_mask": rows.mask(), "position_ids": rows.place_RW}


def _hidden(model: PreTrainedModel, rows: Rows) -> torch.Tensor:
    """Last hidden states (R, W, D), after the final norm."""
    with _attention(model, rows):
        return model.base_model(**_fed(rows), use_cache=False).last_hidden_state


def _attention(model: PreTrainedModel, rows: Rows) -> AbstractContextManager[None]:
    """How attention is to be taken; in training mode passes are checkpointed, and repeated outside of this."""
    count, width = rows.ids_RW.shape
    is_bf16 = model.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if is_bf16 and count * width**2 <= _PLAIN_SCORES and not model.training:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _own_logits(model: PreTrainedModel, rows: Rows) -> torch.Tensor:
    """Logits (N, V) by the model's own head, which runs once per place that predicts something."""
    is_kept_RW = torch.zeros_like(rows.ids_RW, dtype=torch.bool)
    is_kept_RW.view(-1)[rows.predictor_N] = True
    out = model(**_fed(rows), use_cache=False, logits_to_keep=is_kept_RW)
    logits_KV = out.logits.view(-1, out.logits.shape[-1])
    return logits_KV[(is_kept_RW.view(-1).cumsum(0) - 1)[rows.predictor_N]]


def _sliced_logp(
    logits_NV: torch.Tensor, token_N: torch.Tensor, temperature_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of N tokens, in slices where the float32 copy is large."""
    height = max(1, _LOGITS_AT_ONCE // logits_NV.shape[1])
    if len(token_N) <= height:
        return _logp(logits_NV, token_N, temperature_N)
    parts = [
        checkpoint(_logp, *slices, use_reentrant=False)
        for slices in zip(logits_NV.split(height), token_N.split(height), temperature_N.split(height), strict=True)
    ]
    return torch.cat([logp for logp, _ in parts]), torch.cat([entropy for _, entropy in parts])


def _logp(
    logits_NV: torch.Tensor, token_N: torch.Tensor, temperature_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    score_NV = (logits_NV.float() / temperature_N[:, None]).log_softmax(1)
    return score_NV.gather(1, token_N[:, None])[:, 0], -torch.linalg.vecdot(score_NV.exp(), score_NV)


# --- trying ----------------------------------------------------------------------------------------------------------


def _has_linear_head(model: PreTrainedModel) -> bool:
    """Whether logits = head(last hidden state): no scale, no cap, and a base model that gives its states."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or model.base_model is model:
        return False
    ids_RW = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    found = getattr(model.base_model(input_ids=ids_RW, use_cache=False), "last_hidden_state", None)
    if found is None:
        return False
    own = model(input_ids=ids_RW, use_cache=False).logits
    return torch.allclose(head(found).float(), own.float(), atol=_TOLERANCE, rtol=_TOLERANCE)


def _can_share(model: PreTrainedModel, has_linear_head: bool) -> bool:
    """Whether two completions side by side in a row have the log-probabilities that each has alone."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window is not None and window < ROW_TOKENS:
        return False
    vocab = model.config.get_text_config().vocab_size
    ids = [tuple(token % vocab for token in part) for part in ((5, 3, 8, 2), (7, 1, 4), (1, 6, 9))]
    pair = [Rollout((Segment("prompt", ids[0]), Segment("model", more)), 1.0, 1.0) for more in ids[1:]]
    kind = Kind(has_linear_head, can_share=True)

    def found(*, is_shared: bool) -> torch.Tensor:
        packed = pack(pair, 64, is_shared=is_shared)
        return torch.cat([logp_entropy_BT(model, micro, kind, _no_autocast)[0] for micro in packed])

    try:
        both = found(is_shared=True)
    except (RuntimeError, TypeError, ValueError):  # it takes no such mask, or no places
        return False
    return torch.allclose(both, found(is_shared=False), atol=_TOLERANCE, rtol=_TOLERANCE)


def _no_autocast() -> AbstractContextManager[None]:
    return torch.autocast("cpu", enabled=False)
