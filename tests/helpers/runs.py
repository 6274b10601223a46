"""Runs of the small network, up to the first step."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

import ocsfast
from helpers.networks import EPOCH, OPTIMIZERS, Net, batch, net
from ocsfast import Pruner


def attach(model: nn.Module, optimizer: Optimizer, ratio: float = 0.5, **options: Any) -> Pruner:
    """A pruner of a model that takes `helpers.networks.batch`; each call of `step` is a check."""
    options = {"check_every": "call", **options}
    return ocsfast.attach(model, ratio, optimizer=optimizer, example_inputs=batch(0)[0], **options)


def run(name: str = "SGD", seed: int = 0, **options: Any) -> tuple[Net, Optimizer, Pruner]:
    """A network, the optimizer of that name, and a pruner that expects 20 epochs."""
    model = net(seed)
    optimizer = OPTIMIZERS[name](model)
    pruner = attach(model, optimizer, **{"total_steps": 20 * EPOCH, **options})
    return model, optimizer, pruner
