"""Deterministic kernels while a step is taken, so that a step taken again gives the same weights."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Determinism:
    """Insists on deterministic kernels until an operation has none, and asks for them from then on.

    To ask is less: where torch may choose, the backward pass of attention with a mask adds up in any order.
    """

    def __init__(self, *, is_strict: bool) -> None:
        self.is_strict = is_strict
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA multiplies for the first time

    def run(self, attempt: Callable[[], Result], may_repeat: Callable[[], bool]) -> Result:
        """What `attempt` returns; made again where it failed for want of such a kernel and has changed nothing yet."""
        try:
            with _kernels(is_strict=self.is_strict):
                return attempt()
        except RuntimeError as error:
            if not self.is_strict or "deterministic" not in str(error) or not may_repeat():
                raise
            log.warning("a step taken again may give other weights: %s", str(error).partition(", but you set")[0])
        self.is_strict = False
        return self.run(attempt, may_repeat)


@contextmanager
def _kernels(*, is_strict: bool) -> Iterator[None]:
    """Deterministic kernels; where one is missing, an error if strict, else a warning of torch's.

    torch would also fill every uninitialised tensor, which costs bandwidth and guards against nothing here.
    """
    was_on, was_warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=not is_strict)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=was_warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill
