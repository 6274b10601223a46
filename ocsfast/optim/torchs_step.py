"""A step of torch's own SGD, Adam or AdamW by a kernel, on the optimizer's own state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ocsfast.ops import functions as ops
from ocsfast.ops.bound import Bound
from ocsfast.ops.capture import is_capturing
from ocsfast.optim.adamw import step_adamw
from ocsfast.optim.one_pass import (
    Gradients,
    ParamGroup,
    is_sparse,
    same_objects,
    scaling_of,
)
from ocsfast.optim.scalars import scalar
from ocsfast.optim.sgd import step_sgd

_SGD = (torch.optim.SGD,)
_ADAM = (torch.optim.Adam, torch.optim.AdamW)


def is_torchs(optimizer: Optimizer) -> bool:
    """Whether a kernel knows the optimizer's rule: torch's own, and no subclass that has another."""
    return type(optimizer) in (*_SGD, *_ADAM)


def step_by_kernel(
    optimizer: Optimizer, bound: Bound, param_group: ParamGroup, penalty: ops.Penalty
) -> bool:
    """Step and shrink bound weights of a param group as torch steps them.

    Nothing that torch keeps of a weight begins here, moves or changes its type.

    Returns:
        False, and nothing has been changed, where the kernel cannot do what torch does: settings that
        it lacks, sparse gradients, state that torch has yet to begin or that lies otherwise than its
        weight.
    """
    device, scaling = bound.plan.tables.device, scaling_of(optimizer)
    if scaling.grad_scale is not None:  # torch's step unscales `.grad` too, which the kernel leaves
        return False
    grads: Gradients = [w.grad for w in bound.weights]
    if not _has_settings(optimizer, param_group, device) or any(map(is_sparse, grads)):
        return False
    lr = scalar(param_group["lr"], device, torch.float64)
    scaling = scaling.on(device)
    if type(optimizer) in _SGD:
        momenta: Gradients | None = [None] * len(grads)
        if param_group["momentum"] != 0:
            momenta = _state_of(optimizer, bound, grads, "momentum_buffer")
        if momenta is None:
            return False
        step_sgd(bound, grads, momenta, lr, param_group, penalty, scaling)
        return True
    averages = _state_of(optimizer, bound, grads, "exp_avg")
    squares = _state_of(optimizer, bound, grads, "exp_avg_sq")
    counts = _counts_of(optimizer, bound, grads)
    if averages is None or squares is None or counts is None:
        return False
    step_adamw(bound, grads, (averages, squares, counts), lr, param_group, penalty, scaling)
    return True


def _has_settings(optimizer: Optimizer, param_group: ParamGroup, device: torch.device) -> bool:
    """Whether the kernel has what a param group asks for."""
    if type(optimizer) in _SGD:
        numbers = [param_group[name] for name in ("momentum", "dampening", "weight_decay")]
        known = True
    else:
        numbers = [*param_group["betas"], param_group["eps"], param_group["weight_decay"]]
        # Adam adds its weight decay to the gradient, AdamW takes it from the weights.
        decoupled = param_group["decoupled_weight_decay"] or param_group["weight_decay"] == 0
        known = decoupled and not param_group["amsgrad"]
    lr = param_group["lr"]
    moves = isinstance(lr, Tensor) and lr.device != device and is_capturing(device)
    return (
        known
        and not moves
        and not param_group["differentiable"]
        and not any([isinstance(number, Tensor) for number in numbers])  # noqa: C419  faster so
    )


def _state_of(optimizer: Optimizer, bound: Bound, grads: Gradients, key: str) -> Gradients | None:
    """What an optimizer keeps of each weight with a gradient, if all of it lies as the weights do."""
    values = _values_of(optimizer, bound, grads, key)
    if same_objects(values, bound.fitting.get(key, ())):
        return values
    for weight, grad, value in zip(bound.weights, grads, values, strict=True):
        if grad is not None and not _lies_as(value, weight):
            return None
    bound.fitting[key] = values
    return values


def _counts_of(optimizer: Optimizer, bound: Bound, grads: Gradients) -> Gradients | None:
    """The steps that each weight with a gradient has taken, if they are counted as the kernel does."""
    counts = _values_of(optimizer, bound, grads, "step")
    if same_objects(counts, bound.fitting.get("step", ())):
        return counts
    wanted = (bound.plan.tables.device, torch.float32, 0)
    for grad, count in zip(grads, counts, strict=True):
        if grad is None:
            continue
        if not isinstance(count, Tensor) or (count.device, count.dtype, count.dim()) != wanted:
            return None
    bound.fitting["step"] = counts
    return counts


def _values_of(
    optimizer: Optimizer, bound: Bound, grads: Sequence[Tensor | None], key: str
) -> Gradients:
    state = optimizer.state
    return [
        None if grad is None or weight not in state else state[weight].get(key)
        for weight, grad in zip(bound.weights, grads, strict=True)
    ]


def _lies_as(value: Tensor | None, weight: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and (value.dtype, value.device) == (weight.dtype, weight.device)
        and value.shape == weight.shape
        and value.stride() == weight.stride()
    )
