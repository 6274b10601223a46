"""Random weights, statistics and inputs for the proof, that tell each index from its neighbours.

With them a label on the wrong index changes the outputs, so it cannot go unseen.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from ocsfast.grouping.proof.copies import copied

logger = logging.getLogger("ocsfast")


def randomize(model: nn.Module) -> None:
    """Draw weights of unit gain, norm scales around one, and buffers that differ from index to index.

    What is positive throughout, such as a variance or a learned step size, stays so, and what ascends
    along its last dimension, such as the knots of a spline, goes on ascending.
    """
    for parameter in model.parameters():
        noise, positive = torch.randn_like(parameter), bool((parameter > 0).all())
        if parameter.dim() > 1:
            fan_in = max(1, parameter.numel() // max(1, parameter.shape[0]))
            ordered = _ascends(parameter)
            parameter.copy_(noise * (2 / fan_in) ** 0.5)
            if ordered:
                parameter.copy_(parameter.sort(-1).values)
        else:
            parameter.add_(0.3 * noise)
        if positive:
            parameter.abs_()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            positive, ordered = bool((buffer > 0).all()), _ascends(buffer)
            buffer.mul_(torch.rand_like(buffer) + 0.5)
            if not positive:
                buffer.add_(0.3 * torch.randn_like(buffer))
            if ordered:
                buffer.copy_(buffer.sort(-1).values)


def _ascends(tensor: Tensor) -> bool:
    """Whether each number of the last dimension is larger than the one before it."""
    return tensor.dim() > 0 and tensor.shape[-1] > 2 and bool((tensor.diff(dim=-1) > 0).all())


def calibrate(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set the batch norms' running statistics to those of what flows into them.

    With random statistics activations would grow from layer to layer, and gates would turn rounding into
    a visible difference. A copy runs, so that what its pass writes elsewhere stays there. To be called
    in the arithmetic of the proof.
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
