"""AdamW whose moments live in host memory: two of a model's four copies in training, needed once a step."""

from typing import Any

import torch

from farflung.learner.ranks import like, local

_SCALARS = ("step",)


class HostAdamW(torch.optim.AdamW):
    """AdamW that brings the moments of one parameter after the other to its device, updates it and takes them back."""

    def step(self, closure: Any = None) -> None:
        """Update all parameters that have gradients."""
        assert closure is None, "gradients are there already"
        (group,) = self.param_groups
        parameters = group["params"]
        try:
            for parameter in parameters:
                if parameter.grad is not None:
                    self._bring(parameter)
                    group["params"] = [parameter]
                    super().step()
                    self._take_back(parameter)
        finally:
            group["params"] = parameters

    def _bring(self, parameter: torch.Tensor) -> None:
        state = self.state[parameter]
        for name in [name for name in state if name not in _SCALARS]:
            state[name] = like(state[name].to(parameter.device, non_blocking=True), parameter)

    def _take_back(self, parameter: torch.Tensor) -> None:
        state = self.state[parameter]
        for name in [name for name in state if name not in _SCALARS]:
            state[name] = _to_host(local(state[name]))


def _to_host(moment: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, which a GPU reaches several times as fast where it is pinned."""
    if moment.device.type == "cpu":
        return moment
    return torch.empty_like(moment, device="cpu", pin_memory=moment.device.type == "cuda").copy_(moment)
