"""What the training of random networks does besides: further outputs, layers, noise and masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Watched(nn.Module):
    """A sequence that does more in training: further outputs, layers, noise and masks of its own."""

    def __init__(self, steps: list[nn.Module], taps: dict[int, tuple[str, int]]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.taps = taps  # behind a step: what training does there, and the width there
        self.extra = nn.ModuleDict()
        for k, (how, width) in taps.items():
            if how in ("head", "head in training"):
                self.extra[str(k)] = nn.Sequential(nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 4))
            elif how == "layer":
                self.extra[str(k)] = nn.Linear(width, width)
            elif how == "branch":
                body = nn.Sequential(nn.Linear(width, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True))
                self.extra[str(k)] = nn.Sequential(body, nn.Linear(6, width))

    def extra_repr(self) -> str:
        return str(self.taps)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        more: list[Tensor] = []
        for k, step in enumerate(self.steps):
            x = step(x)
            if k in self.taps:
                x = self.tapped(x, k, more)
        return [x, *more] if self.training and more else x

    def tapped(self, x: Tensor, k: int, more: list[Tensor]) -> Tensor:
        how, width = self.taps[k]
        layer = self.extra[str(k)] if str(k) in self.extra else nn.Identity()
        dim = 1 if x.dim() == 4 else -1
        flat = x.mean((2, 3)) if x.dim() == 4 else x.mean(1)
        shape = (-1, width, 1, 1) if x.dim() == 4 else (-1, 1, width)
        if how == "head":
            more.append(layer(flat))
        elif how == "kept":
            self.kept = [x]
        elif not self.training:
            return x
        elif how == "head in training":
            more.append(layer(flat))
        elif how == "features":
            more.append(x)
        elif how == "noise":
            x = x + 0.1 * torch.randn_like(x)
        elif how == "dropout":
            x = F.dropout(x, 0.2, self.training)
        elif how == "mask":  # of a width that training code alone reads
            x = x * (torch.rand(width) > 0.1).view(shape)
        elif how == "mask by shape":
            x = x * x.new_empty(len(x), x.shape[dim]).bernoulli_(0.9).view(shape)
        elif how in ("layer", "branch"):
            x = x + layer(flat).view(shape)
        return x


TAPS = (
    *("head", "head", "head in training", "features", "kept"),
    *("noise", "dropout", "mask", "mask by shape", "layer", "branch"),
)
