"""One forward pass of a causal LM over a packed micro-batch, as far as the log-probabilities of its trained tokens.

A model's abilities are found by trying it, not by its name: whether its logits are a linear map of its last hidden
state, whether it obeys an attention mask that keeps completions in one row apart, on texts that exceed its windows, and
whether rows of several lengths may be padded.

Legend: B rollouts, T positions of completions, R rows of W tokens, N trained tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from farflung.learner.chunked_logp import token_logp
from farflung.learner.pack import MicroBatch, Rollout, Segment, pack
from farflung.learner.straight_through import rounding_of
from farflung.numerics.devices import blocks
from farflung.numerics.packing import PackedRows
from farflung.numerics.trying import Text, Trial, first_that_holds, remembers_all, tried

_OWN_HEAD = 4
"""Where the model's own head makes the logits, so many times as many are held at once; more are softmaxed in slices."""
_PLAIN_SCORES = 1 << 17
"""Scores of one head up to which attention in bfloat16 is taken by plain products on a CPU. For rows of 60 to 140
tokens torch's flash kernel takes 3 ms a layer backwards; a step of SmolLM2 takes 3.3 instead of 4.7 s without it."""
_TOLERANCE = 1e-3
"""By how much, in nats and as a share, logits of a head that is tried may be off."""
_LOUD, _QUIET = 1e3, 1e-6
"""Standard deviation of states with which a head is tried, and the least from which they are made louder."""


@dataclass(frozen=True, slots=True)
class Kind:
    """The facts known of a model's architecture."""

    has_linear_head: bool
    can_share: bool
    can_pad: bool = True


_KINDS: WeakKeyDictionary[PreTrainedModel, Kind] = WeakKeyDictionary()


@torch.no_grad()
def find_kind(model: PreTrainedModel, trial: Trial | None = None) -> Kind:
    """Try a model on a few texts, once. A `trial` of it that is at hand need not be made again."""
    if model not in _KINDS:
        kind = Kind(_has_linear_head(model), can_share=False, can_pad=False)
        if (trial := tried(model, trial)) is None:
            return kind
        kinds = [replace(kind, can_share=True, can_pad=True), replace(kind, can_pad=True), kind]
        _KINDS[model] = first_that_holds(kinds if remembers_all(model.config) else kinds[1:], partial(_holds, trial))
    return _KINDS[model]


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
            hidden_ND = _hidden(model, micro.rows, kind).flatten(0, 1)[micro.rows.predictor_N]
            rounding_VD = None
            if torch.is_autocast_enabled(model.device.type):
                hidden_ND = hidden_ND.to(torch.get_autocast_dtype(model.device.type))
                rounding_VD = rounding_of(head)
        logp_N, entropy_N = token_logp(hidden_ND, head.weight, head.bias, token_N, temperature_N, rounding_VD)
    else:
        with autocast():
            logits_NV = _own_logits(model, micro.rows, kind)
        logp_N, entropy_N = _sliced_logp(logits_NV, token_N, temperature_N)
    zeros_BT = torch.zeros(micro.mask_BT.shape, device=model.device)
    return zeros_BT.masked_scatter(micro.mask_BT, logp_N), zeros_BT.masked_scatter(micro.mask_BT, entropy_N)


def _fed(rows: PackedRows) -> dict[str, torch.Tensor]:
    fed = {"input_ids": rows.ids_RW}
    return fed if rows.is_plain else fed | {"attention_mask": rows.mask(), "position_ids": rows.place_RW}


def _hidden(model: PreTrainedModel, rows: PackedRows, kind: Kind) -> torch.Tensor:
    """Last hidden states (R, W, D), after the final norm."""
    if not kind.can_pad:
        return _one_by_one(rows, lambda ids_1W: model.base_model(input_ids=ids_1W, use_cache=False).last_hidden_state)
    with _attention(model, rows):
        return model.base_model(**_fed(rows), use_cache=False).last_hidden_state


def _one_by_one(rows: PackedRows, run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A model's output for each row without its padding, padded again (R, W, …)."""
    widths = (rows.tree_RW >= 0).sum(1).tolist()
    parts = [run(ids_W[None, :width])[0] for ids_W, width in zip(rows.ids_RW, widths, strict=True)]
    return pad_sequence(parts, batch_first=True)


def _attention(model: PreTrainedModel, rows: PackedRows) -> AbstractContextManager[None]:
    """How attention is to be taken; passes that are checkpointed are repeated outside of this."""
    count, width = rows.ids_RW.shape
    is_bf16 = model.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if is_bf16 and count * width**2 <= _PLAIN_SCORES and not model.is_activation_checkpointing:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _own_logits(model: PreTrainedModel, rows: PackedRows, kind: Kind) -> torch.Tensor:
    """Logits (N, V) by the model's own head, which runs once per place that predicts something."""
    if not kind.can_pad:
        logits_RWV = _one_by_one(rows, lambda ids_1W: model(input_ids=ids_1W, use_cache=False).logits)
        return logits_RWV.flatten(0, 1)[rows.predictor_N]
    is_kept_RW, which_N = rows.predicting()
    out = model(**_fed(rows), use_cache=False, logits_to_keep=is_kept_RW)
    logits_KV = out.logits.view(-1, out.logits.shape[-1])
    return logits_KV[which_N]


def _sliced_logp(
    logits_NV: torch.Tensor, token_N: torch.Tensor, temperature_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of N tokens, in slices where the float32 copy is large."""
    height = max(1, _OWN_HEAD * blocks(logits_NV.device).head_logits // logits_NV.shape[1])
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
    return all(_is_linear(model, ids_RW, found * size) for size in (1.0, _LOUD / found.std().clamp_min(_QUIET).item()))


def _is_linear(model: PreTrainedModel, ids_RW: torch.Tensor, hidden_RWD: torch.Tensor) -> bool:
    """Whether the head makes of these states what the model makes of its own text, whose states are put in their place.

    Loud ones show a cap that the weights as they are do not come near.
    """
    head = model.get_output_embeddings()
    hidden_RWD = hidden_RWD.to(head.weight.dtype)
    hook = head.register_forward_pre_hook(lambda *_: (hidden_RWD,))
    try:
        own_RWV = model(input_ids=ids_RW, use_cache=False).logits
    finally:
        hook.remove()
    return torch.allclose(head(hidden_RWD).float(), own_RWV.float(), atol=_TOLERANCE, rtol=_TOLERANCE)


def _holds(trial: Trial, kind: Kind) -> bool:
    """Whether packed micro-batches have the log-probabilities of one plain pass over each text."""

    def packed(texts: Sequence[Text]) -> list[torch.Tensor]:
        rollouts = [Rollout((Segment("prompt", text.prompt), Segment("model", text.tail)), 1.0, 1.0) for text in texts]
        found: dict[int, torch.Tensor] = {}
        for micro in pack(rollouts, sum(map(len, rollouts)) ** 2, is_shared=kind.can_share):
            logp_BT, _ = logp_entropy_BT(trial.model, micro, kind, _no_autocast)
            found |= zip(micro.index, logp_BT, strict=True)
        return [found[index] for index in range(len(texts))]

    return trial.holds_logp(packed)


def _no_autocast() -> AbstractContextManager[None]:
    return torch.autocast("cpu", enabled=False)
