"""Clocks that are told what calls take, so that no test depends on the speed of a machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ocsfast.latency.calls import Call

NANOSECOND = 1e-9
EACH = 1000  # nanoseconds of an element of a weight


@dataclass
class WeightClock:
    """A convolution or a linear layer takes EACH nanoseconds an element of its weight, others none.

    Interpolation between widths is then exact. The model takes what its layers sum to, and `rest` more.
    """

    model: nn.Module
    rest: int = 0
    calls: int = 0

    def __call__(self, call: Call) -> float:
        self.calls += 1
        call()
        if call.operator == "model":
            return NANOSECOND * (EACH * weights_of(self.model) + self.rest)
        if call.operator.startswith(("aten.conv", "aten.linear")):
            return NANOSECOND * EACH * torch.Size(call.shapes[1]).numel()
        return 0.0


def weights_of(model: nn.Module) -> int:
    """Elements of all weights of convolutions and linear layers."""
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, kinds))
