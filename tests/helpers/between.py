"""A layer, something in between, and a layer that reads it: what of the first may go."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ocsfast.core.families import Families
from ocsfast.grouping.engines import group


class Between(nn.Module):
    """A convolution or linear layer, something in between, and one that reads it."""

    def __init__(self, first: nn.Module, between: Callable[[Tensor], Tensor], second: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.second = first, between, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def grouped(model: nn.Module, *inputs: Tensor) -> Families:
    torch.manual_seed(0)
    families = group(model, inputs)
    assert not [f for f in families.frozen if "cutting it fails" in f.reason], families.frozen
    return families


def free(families: Families, name: str, axis: int = 0) -> int:
    """How many indices along an axis may go."""
    axes = [a for a in families.axes if (a.tensor, a.axis) == (name, axis)]
    return int((axes[0].groups >= 0).sum()) if axes else 0


def convs(between: Callable[[Tensor], Tensor], out: int = 8, into: int | None = None) -> Families:
    model = Between(nn.Conv2d(3, out, 3, padding=1), between, nn.Conv2d(into or out, 4, 1))
    return grouped(model, torch.randn(2, 3, 8, 8))


def linears(between: Callable[[Tensor], Tensor], out: int = 8, into: int | None = None) -> Families:
    model = Between(nn.Linear(5, out), between, nn.Linear(into or out, 4))
    return grouped(model, torch.randn(2, 6, 5))
