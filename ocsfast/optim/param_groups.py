"""What an optimizer's param groups say of the coming step, read without waiting for a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

# A number, or a 0-dim tensor on an accelerator, which nobody reads: that would wait for the device.
Scalar = float | Tensor


def learning_rate(param_group: Mapping[str, Any]) -> Scalar:
    """A param group's learning rate, as a float where that costs no synchronisation."""
    lr = param_group["lr"]
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return lr.reshape(()) if lr.dim() else lr
    return float(lr)


def stands_still(optimizer: Optimizer) -> bool:
    """Whether a step moves no weight, as every learning rate is 0.

    torch.distributed.checkpoint takes such steps, to have the state that it saves or loads.
    """
    rates = (learning_rate(param_group) for param_group in optimizer.param_groups)
    return all(not isinstance(rate, Tensor) and rate == 0 for rate in rates)


def momentum_gain(param_group: Mapping[str, Any]) -> float:
    """1 - momentum: a constant gradient moves a weight by lr / (this) a step in the long run.

    Adam's moving average has no such gain.
    """
    momentum = param_group.get("momentum", 0.0)
    dampening = param_group.get("dampening", 0.0)
    if isinstance(momentum, Tensor) or isinstance(dampening, Tensor) or not 0 <= dampening < 1:
        return 1.0
    return (1.0 - float(momentum)) / (1.0 - float(dampening))


def same_scalar(a: Scalar, b: Scalar) -> bool:
    """Whether two learning rates are known to be equal without reading a device."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return a == b


def gradient_scale(optimizer: Optimizer) -> Tensor | None:
    """The factor by which a fused optimizer will divide the gradients in this step, if any."""
    scale = getattr(optimizer, "grad_scale", None)
    return scale if isinstance(scale, Tensor) else None


def overflowed(optimizer: Optimizer) -> Tensor | None:
    """0-dim, not 0 if a fused optimizer will skip this step by itself; None if it cannot tell."""
    found = getattr(optimizer, "found_inf", None)
    return found if isinstance(found, Tensor) else None
