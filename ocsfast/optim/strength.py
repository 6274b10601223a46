"""How strong the penalty is: Eq. 7 as the paper has it, and the automatic ramp."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ocsfast.core.config import Config
from ocsfast.optim.param_groups import Scalar


def paper_lambda(config: Config, elapsed: int) -> float:
    """Eq. 7: lambda `elapsed` = t - t_sl checks after sparsity learning began.

    growth="recursive": lambda_t = lambda_{t-1} + delta * floor((t - t_sl) / delta_every), as written.
    growth="linear": lambda_0 + delta * floor((t - t_sl) / delta_every), the paper's prose and code.
    """
    intervals, rest = divmod(max(0, elapsed), config.delta_every)
    if config.growth == "linear":
        return config.lambda0 + config.delta * intervals
    # sum of floor(k / d) for k = 1 .. elapsed: each value below `intervals` occurs d times
    total = config.delta_every * intervals * (intervals - 1) // 2 + intervals * (rest + 1)
    return config.lambda0 + config.delta * total


@dataclass(frozen=True)
class Ramp:
    """The automatic strength: lambda * lr, the relative shrinkage of one step, grows over `steps` steps.

    Its running sum is nats * p**2 ("linear") or nats * p**4 ("cubic") at the share p of the stage, so
    it is `nats` at the end whatever the learning rate does meanwhile. A stage that lasts longer than
    planned goes on at the last rate.
    """

    nats: float
    steps: float | Tensor
    shape: str

    def total(self, step: float | Tensor) -> float | Tensor:
        """Sum of lambda * lr over the first `step` steps; a tensor where one of these numbers is."""
        power = 2 if self.shape == "linear" else 4
        p = step / self.steps
        if isinstance(p, Tensor):
            return self.nats * torch.where(p <= 1, p**power, 1 + power * (p - 1))
        return self.nats * (p**power if p <= 1 else 1 + power * (p - 1))

    def at(self, step: float | Tensor) -> float | Tensor:
        """lambda * lr of step number `step`, 0-based."""
        return self.total(step + 1) - self.total(step)


def lambda_for(rate: Scalar, shrinkage: Scalar) -> Scalar:
    """The lambda with lambda * rate = shrinkage; 0 where the rate is 0."""
    if isinstance(rate, Tensor):
        return torch.where(rate > 0, shrinkage / rate, torch.zeros_like(rate))
    return shrinkage / rate if rate > 0 else 0.0
