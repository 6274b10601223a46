"""Random weights, statistics and inputs for the proof, that tell each index from its neighbours.

With them a label on the wrong index changes the outputs, so it cannot go unseen.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from ocsfast.grouping.proof.arithmetic import Double
from ocsfast.grouping.proof.copies import copied

logger = logging.getLogger("ocsfast")


def randomize(model: nn.Module) -> None:
    """Draw weights of unit gain, norm scales around one, and buffers that differ from index to index."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() > 1:
            fan_in = max(1, parameter.numel() // max(1, parameter.shape[0]))
            parameter.copy_(noise * (2 / fan_in) ** 0.5)
        else:
            parameter.add_(0.3 * noise)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            positive = bool((buffer > 0).all())
            buffer.mul_(torch.rand_like(buffer) + 0.5)
            if not positive:  # a variance must stay positive
                buffer.add_(0.3 * torch.randn_like(buffer))


def calibrate(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set the batch norms' running statistics to those of what flows into them.

    With random statistics activations would grow from layer to layer, and gates would turn rounding into
    a visible difference. A copy runs, so that what its pass writes elsewhere stays there.
    """
    taught = copied(model)
    norms: list[tuple[Any, Any]] = [
        (norm, twin)
        for norm, twin in zip(model.modules(), taught.modules(), strict=True)
        if isinstance(getattr(norm, "running_var", None), Tensor) and hasattr(norm, "momentum")
    ]
    if not norms:
        return
    for _, twin in norms:
        twin.train()
        twin.momentum = 1.0
    try:
        with Double():
            taught(*args, **kwargs)
    except Exception as error:  # for example too few values for a variance: the statistics stay random
        logger.debug("batch norms keep their statistics: %s", error)
    for norm, twin in norms:
        norm.running_mean.copy_(twin.running_mean)
        norm.running_var.copy_(twin.running_var.clamp(min=0.1))


def random_input(x: Any) -> Any:
    """Normal float64 numbers in the shape of a floating-point tensor; anything else unchanged.

    A sparse tensor keeps its numbers, as what it holds is the structure of a graph.
    """
    if isinstance(x, Tensor) and x.is_floating_point():
        if x.layout is not torch.strided:
            return x.double()
        return torch.randn_like(x, dtype=torch.float64)
    return x
