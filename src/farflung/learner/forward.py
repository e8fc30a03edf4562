"""One forward pass of a causal LM over a packed micro-batch, as far as the log-probabilities of its trained tokens.

A model's abilities are found by trying it, not by its name: whether its logits are a linear map of its last hidden
state, whether it obeys an attention mask that keeps completions in one row apart, on texts that exceed its windows, and
whether rows of several lengths may be padded.

Legend: B rollouts, T positions of completions, R rows of W tokens, N trained tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple
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
def find_kind(model: PreTrainedModel, trial: Trial | None = None, dtype: torch.dtype | None = None) -> Kind:
    """Try a model on a few texts, once. A `trial` of it that is at hand need not be made again.

    A sharded model computes in another `dtype` than its masters have.
    """
    if model not in _KINDS:
        kind = Kind(_has_linear_head(model), can_share=False, can_pad=False)
        if (trial := tried(model, trial, dtype)) is None:
            return kind
        kinds = [replace(kind, can_share=True, can_pad=True), replace(kind, can_pad=True), kind]
        _KINDS[model] = first_that_holds(kinds if remembers_all(model.config) else kinds[1:], partial(_holds, trial))
    return _KINDS[model]


class Asked(NamedTuple):
    """The tokens whose log-probabilities are wanted, with the place, counted over all rows, that predicts each."""

    predictor_N: torch.Tensor
    token_N: torch.Tensor
    temperature_N: torch.Tensor
    is_entropy_trained: bool

    def of_row(self, row: int, width: int) -> "Asked":
        """Those of one row, which is then the only one."""
        is_own_N = self.predictor_N // width == row
        here = self.predictor_N[is_own_N] - row * width
        return Asked(here, self.token_N[is_own_N], self.temperature_N[is_own_N], self.is_entropy_trained)


def logp_entropy_BT(
    model: PreTrainedModel,
    micro: MicroBatch,
    kind: Kind,
    autocast: Callable[[], AbstractContextManager[None]],
    *,
    is_entropy_trained: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits / T) of each trained token and the entropy of its distribution, float32 (B, T), 0 off mask.

    Prompts and padding cost the output head nothing.
    """
    micro = micro.to(model.device)
    temperature_N = micro.temperature_B[:, None].expand_as(micro.mask_BT)[micro.mask_BT]
    asked = Asked(micro.rows.predictor_N, micro.token_BT[micro.mask_BT], temperature_N, is_entropy_trained)
    logp_N, entropy_N = logp_entropy_N(model, micro.rows, kind, autocast, asked)
    zeros_BT = torch.zeros(micro.mask_BT.shape, device=model.device)
    return zeros_BT.masked_scatter(micro.mask_BT, logp_N), zeros_BT.masked_scatter(micro.mask_BT, entropy_N)


def logp_entropy_N(
    model: PreTrainedModel,
    rows: PackedRows,
    kind: Kind,
    autocast: Callable[[], AbstractContextManager[None]],
    asked: Asked,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of tokens one after the other, float32 (N,)."""
    if kind.has_linear_head:
        with autocast():
            logp_N, entropy_N = _by_head(model, rows, kind, asked)
        return logp_N, entropy_N
    with autocast():
        logits_NV = _own_logits(model, rows, kind)
    return _sliced_logp(logits_NV, asked.token_N, asked.temperature_N)


def _fed(rows: PackedRows) -> dict[str, torch.Tensor]:
    fed = {"input_ids": rows.ids_RW}
    return fed if rows.is_plain else fed | {"attention_mask": rows.mask(), "position_ids": rows.place_RW}


def _by_head(model: PreTrainedModel, rows: PackedRows, kind: Kind, asked: Asked) -> torch.Tensor:
    """Log-probability and entropy of each token (2, N): the head gives them in place of logits, which are never whole.

    It does so within the model's own pass: the weights of a sharded one are there only as long as that lasts.
    """
    if kind.can_pad:
        with _attention(model, rows), _head_answers(model, asked):
            return model(**_fed(rows), use_cache=False).logits
    found = []
    for row, (ids_W, tree_W) in enumerate(zip(rows.ids_RW, rows.tree_RW, strict=True)):
        with _head_answers(model, asked.of_row(row, len(ids_W))):
            found.append(model(input_ids=ids_W[None, : int((tree_W >= 0).sum())], use_cache=False).logits)
    return torch.cat(found, 1)


@contextmanager
def _head_answers(model: PreTrainedModel, asked: Asked) -> Iterator[None]:
    """Have a linear head give log-probabilities and entropies, as `_by_head` says, for as long as this lasts."""
    head = model.get_output_embeddings()

    def answer(hidden_RWD: torch.Tensor) -> torch.Tensor:
        kind = hidden_RWD.device.type
        hidden_ND, rounding_VD = hidden_RWD.flatten(0, 1)[asked.predictor_N], None
        if torch.is_autocast_enabled(kind):
            hidden_ND, rounding_VD = hidden_ND.to(torch.get_autocast_dtype(kind)), rounding_of(head)
        with torch.autocast(kind, enabled=False):
            found = token_logp(
                hidden_ND,
                head.weight,
                head.bias,
                asked.token_N,
                asked.temperature_N,
                rounding_VD,
                is_entropy_trained=asked.is_entropy_trained,
            )
            return torch.stack(found)

    head.forward = answer
    try:
        yield
    finally:
        del head.forward


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
    """Whether the logits are what a linear head makes of its input: no scale and no cap comes after it.

    Loud states show a cap that the weights as they are do not come near.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return False
    states: list[torch.Tensor] = []
    own = _is_linear(model, lambda hidden_RWD: states.append(hidden_RWD) or hidden_RWD)
    if not own or not states:
        return own
    louder = _LOUD / states[0].std().clamp_min(_QUIET).item()
    return _is_linear(model, lambda hidden_RWD: hidden_RWD * louder)


def _is_linear(model: PreTrainedModel, change: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether a text's logits are what came out of the head, whose input is changed on its way."""
    head, ids_RW = model.get_output_embeddings(), torch.arange(4, device=model.device)[None]
    came: list[torch.Tensor] = []
    hooks = [
        head.register_forward_pre_hook(lambda _, given: (change(given[0]),)),
        head.register_forward_hook(lambda _, given, out: came.append(out)),
    ]
    try:
        own_RWV = model(input_ids=ids_RW % model.config.get_text_config().vocab_size, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(came) != 1 or came[0].shape != own_RWV.shape:
        return False
    return torch.allclose(came[0].float(), own_RWV.float(), atol=_TOLERANCE, rtol=_TOLERANCE)


def _holds(trial: Trial, kind: Kind) -> bool:
    """Whether packed micro-batches have the log-probabilities of one plain pass over each text."""

    def packed(texts: Sequence[Text]) -> list[torch.Tensor]:
        rollouts = [Rollout((Segment("prompt", text.prompt), Segment("model", text.tail)), 1.0, 1.0) for text in texts]
        found: dict[int, torch.Tensor] = {}
        for micro in pack(rollouts, sum(map(len, rollouts)) ** 2, is_shared=kind.can_share):
            logp_BT, _ = logp_entropy_BT(trial.model, micro, kind, nullcontext)
            found |= zip(micro.index, logp_BT, strict=True)
        return [found[index] for index in range(len(texts))]

    return trial.holds_logp(packed)
