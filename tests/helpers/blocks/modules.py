"""Parametrizations, checkpoints, containers, and modules that are used twice."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from helpers.blocks.convolutional import Csp
from helpers.blocks.parts import Case, Classifier, Conv, image


def normed(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    body = nn.Sequential(wrap(nn.Conv2d(8, 10, 3)), nn.ReLU(), wrap(nn.Conv2d(10, 6, 1)))
    return Classifier(body, 8, 6)


def weight_norm_old() -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Case(normed(nn.utils.weight_norm), image())


def weight_norm_new() -> Case:
    return Case(normed(nn.utils.parametrizations.weight_norm), image())


def spectral_norm_old() -> Case:
    return Case(normed(nn.utils.spectral_norm), image())


def spectral_norm_new() -> Case:
    return Case(normed(nn.utils.parametrizations.spectral_norm), image())


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.requires_grad:
            return checkpoint(self.body, x, use_reentrant=False)
        return self.body(x)


def checkpointed() -> Case:
    return Case(Classifier(Checkpointed(Csp(8, 12)), 8, 12), image())


def checkpointed_always() -> Case:
    class Always(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    return Case(Classifier(Always(Csp(8, 12)), 8, 12), image())


def containers() -> Case:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleDict(
                {
                    "a": nn.ModuleList(
                        [Conv(8, 8, 3), nn.Sequential(Conv(8, 8), nn.Sequential(Conv(8, 8)))]
                    ),
                    "b": nn.ModuleList([Conv(8, 12, 3)]),
                }
            )
            self.scales = nn.ParameterList([nn.Parameter(torch.ones(8, 1, 1)) for _ in range(2)])
            self.extra = nn.ParameterDict({"shift": nn.Parameter(torch.zeros(1, 12, 1, 1))})

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.stages.values()
            for layer, scale in zip(first.children(), self.scales, strict=True):
                x = x + layer(x) * scale
            (last,) = second.children()
            return last(x) + self.extra["shift"]

    return Case(Classifier(Nested(), 8, 12), image())


def used_twice() -> Case:
    """One module, two places (and two names)."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Conv(8, 8, 3)
            self.again = self.first
            self.out = Conv(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.again(F.relu(self.first(x))))

    return Case(Classifier(Twice(), 8, 6), image())
