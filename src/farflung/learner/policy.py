"""The policy in training: a Hugging Face causal LM with float32 masters, its log-probabilities and its publication.

Legend: B rollouts, T positions, N trained tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from farflung.learner.pack import MicroBatch
from farflung.protocol.errors import ConfigError

_LOGITS_AT_ONCE = 1 << 25
"""float32 logits held at once (128 MiB): the softmax of more tokens is taken in slices, recomputed backwards."""


class Policy:
    """A model whose masters are float32 and whose forward pass may run in bfloat16."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        compute_dtype: torch.dtype = torch.float32,
        is_checkpointed: bool = False,
    ) -> None:
        """Take a model; its parameters become float32. `is_checkpointed` trades a second forward pass for memory.

        Dropout stays off, or the ratio of the first update would not be 1; but transformers checkpoints activations
        in training mode only, so there a model with dropout must have it set to 0 in its config.
        """
        self.model = model.float().train(is_checkpointed)
        self.compute_dtype = compute_dtype
        if is_checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        compute_dtype: torch.dtype = torch.float32,
        is_checkpointed: bool = False,
        device: str = "cpu",
    ) -> "Policy":
        """Load a folder or a hub id; safetensors only, no remote code. Raises ConfigError if there is no such model."""
        try:
            model = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch.float32,
                attn_implementation="sdpa",
                trust_remote_code=False,
                use_safetensors=True,
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"no model at {str(source)!r}; give a folder or a model hub id ({reason})") from error
        return cls(model.to(device), compute_dtype=compute_dtype, is_checkpointed=is_checkpointed)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def logp_BT(self, micro: MicroBatch) -> torch.Tensor:
        """log softmax(logits / T) of each trained token given what precedes it, float32 (B, T); 0 off the mask."""
        return self.logp_entropy_BT(micro, with_entropy=False)[0]

    def logp_entropy_BT(
        self, micro: MicroBatch, *, with_entropy: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `logp_BT`, and the entropy in nats of each of those distributions, without gradient, (B, T).

        The output head runs on trained positions only: prompts and padding cost it nothing.
        """
        micro = micro.to(self.device)
        logits_NV = self._logits(micro)
        token_N = micro.ids_BT[micro.mask_BT]
        temperature_N = micro.temperature_B[:, None].expand_as(micro.mask_BT)[micro.mask_BT]
        logp_N, entropy_N = _sliced_logp(logits_NV, token_N, temperature_N, with_entropy)
        zeros_BT = torch.zeros(micro.mask_BT.shape, device=self.device)
        entropy_BT = zeros_BT.masked_scatter(micro.mask_BT, entropy_N) if with_entropy else None
        return zeros_BT.masked_scatter(micro.mask_BT, logp_N), entropy_BT

    def tensors(self, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, torch.Tensor]]:
        """What is published: (name, tensor) of every parameter and buffer, cast from the masters, tied twins once."""
        for name, tensor in self.masters():
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor.clone()

    def masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the float32 masters themselves, tied twins once, in the model's order."""
        seen: set[int] = set()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor.detach()

    def _logits(self, micro: MicroBatch) -> torch.Tensor:
        """Logits (N, V) that predict each trained token, row after row. Padding is on the right: causal is enough."""
        is_kept_BT = micro.mask_BT[:, 1:]
        with self._autocast():
            out = self.model(micro.ids_BT[:, :-1], use_cache=False, logits_to_keep=is_kept_BT)
        return out.logits.view(-1, out.logits.shape[-1])

    def _autocast(self) -> AbstractContextManager[None]:
        is_mixed = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, self.compute_dtype if is_mixed else torch.bfloat16, enabled=is_mixed)


def _sliced_logp(
    logits_NV: torch.Tensor, token_N: torch.Tensor, temperature_N: torch.Tensor, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy (empty if not asked for) of N tokens, in slices where the float32 copy is large."""
    height = max(1, _LOGITS_AT_ONCE // logits_NV.shape[1])
    if len(token_N) <= height:
        return _logp(logits_NV, token_N, temperature_N, with_entropy)
    parts = [
        checkpoint(_logp, *slices, with_entropy, use_reentrant=False)
        for slices in zip(logits_NV.split(height), token_N.split(height), temperature_N.split(height), strict=True)
    ]
    return torch.cat([logp for logp, _ in parts]), torch.cat([entropy for _, entropy in parts])


def _logp(
    logits_NV: torch.Tensor, token_N: torch.Tensor, temperature_N: torch.Tensor, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    score_NV = logits_NV.float() / temperature_N[:, None]
    log_sum_N = score_NV.logsumexp(dim=1)
    logp_N = score_NV.gather(1, token_N[:, None])[:, 0] - log_sum_N
    if not with_entropy:
        return logp_N, logp_N.new_zeros(0)
    with torch.no_grad():
        mean_score_N = ((score_NV - log_sum_N[:, None]).exp_() * score_NV).sum(dim=1)
        return logp_N, log_sum_N - mean_score_N
