"""Seeded noise inside vLLM: a logits processor that comes before a greedy pick. It runs in vLLM's environment.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --tokens-only --logits-processors farflung.engine.vllm_noise:SeededNoise

Of this package it needs `seeded_rows` and `noise`, which need torch and numpy. A request brings its seed and
temperature as extra arguments and has vLLM's own temperature at 0. Tried with vLLM 0.32 on CPUs.

Legend: B rows of the batch, V vocabulary.
"""

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotLogitsProcessor

from farflung.engine.seeded_rows import Asked, SeededRows, add_noise, asked


class SeededNoise(LogitsProcessor, SlotLogitsProcessor):
    """Both interfaces of vLLM in one class, so that one name loads whichever model runner vLLM chooses.

    The first runner tells how requests move between rows of the batch; the second gives each request a slot for life
    and tells with every step which row is whose.
    """

    def __init__(
        self, vllm_config: VllmConfig, place: torch.device | LogitsProcRequestState, is_pin_memory: bool = False
    ) -> None:
        """`place` is the device for the first runner, the state of all slots for the second."""
        self._rows = SeededRows()
        self._slots: dict[int, Asked] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError, which the client sees, for a seed that cannot be obeyed."""
        if asked(sampling_params.extra_args) is not None and sampling_params.temperature != 0:
            raise ValueError(
                f"temperature is {sampling_params.temperature}; a seeded request needs 0, its own temperature goes "
                "into farflung_temperature"
            )

    def is_argmax_invariant(self) -> bool:
        """No: the noise is what picks."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests between rows: first those that left, then the new ones, then the moves."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.drop(row)
        for row, params, prompt_ids, output_ids in batch_update.added:
            self._rows.put(row, asked(params.extra_args), len(prompt_ids or ()), output_ids)
        for source, target, how in batch_update.moved:
            self._rows.move(source, target, is_swap=how == MoveDirectionality.SWAP)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """A request takes a slot that another may have had; says whether it is seeded."""
        wanted = asked(sampling_params.extra_args)
        self._slots.pop(req_idx, None)
        if wanted is not None:
            self._slots[req_idx] = wanted
        return wanted is not None

    def apply(self, logits_BV: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """`logits / T + noise` in place."""
        return self._rows.add_noise(logits_BV) if ctx is None else add_noise(logits_BV, self._places(ctx))

    def _places(self, ctx: LogitsContext) -> list[tuple[int, Asked, int]]:
        """(row, what it wants, position) of each seeded row."""
        slots, position = ctx.expanded_idx_mapping.tolist(), ctx.pos.tolist()
        return [(row, self._slots[slot], position[row]) for row, slot in enumerate(slots) if slot in self._slots]
