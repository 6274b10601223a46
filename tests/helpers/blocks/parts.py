"""What the blocks stand in: a case, its inputs, and the networks around a block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network and one batch for it."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def image(channels: int = 3, side: int = 8) -> tuple[Tensor]:
    """A batch of two square images."""
    return (torch.randn(2, channels, side, side),)


def tokens(width: int = 16, length: int = 6) -> tuple[Tensor]:
    """A batch of two sequences."""
    return (torch.randn(2, length, width),)


class Conv(nn.Module):
    """Convolution, norm, activation."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, g: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Classifier(nn.Module):
    """A stem, a body on feature maps, and a linear head on their means."""

    def __init__(self, body: nn.Module, width: int, out: int) -> None:
        super().__init__()
        self.stem = Conv(3, width, 3)
        self.body = body
        self.head = nn.Linear(out, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Sequence(nn.Module):
    """An embedding, residual blocks on tokens behind layer norms, and a head."""

    def __init__(self, body: nn.Module, width: int = 16, given: int = 7) -> None:
        super().__init__()
        self.embed = nn.Linear(given, width)
        self.norm = nn.LayerNorm(width)
        self.body = body
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.body(self.norm(x))
        return self.head(self.last(x))
