"""Eq. 8 and Eq. 9 on a model's weights: what the optimizer hooks of a pruner do.

Nothing here waits for the device: strengths and factors are 0-dim device tensors, filled by value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ocsfast import ops
from ocsfast.errors import StateError
from ocsfast.grouping.families import Families
from ocsfast.optimizers import (
    Scalar,
    gradient_scale,
    learning_rate,
    momentum_gain,
    overflowed,
    owned,
    same_scalar,
)
from ocsfast.plan import Plan, build_plan


@dataclass(frozen=True, eq=False)
class Part:
    """Coupled weights whose learning rate is that of one parameter group."""

    plan: Plan
    weights: tuple[nn.Parameter, ...]
    group: int  # number of the optimizer's parameter group
    share: float  # of all coupled weights' elements
    strength: Tensor  # 0-dim float32, scratch: what multiplies Eq. 8's direction
    factor: Tensor  # 0-dim float32, scratch: what Eq. 9 multiplies by


@dataclass(frozen=True, eq=False)
class Bound:
    """The plan with the weights it walks, as they lie in memory now."""

    whole: Part
    parts: tuple[Part, ...]  # by parameter group; only `whole` where one group holds them all
    pointers: tuple[int, ...]

    @property
    def plan(self) -> Plan:
        return self.whole.plan

    @property
    def weights(self) -> tuple[nn.Parameter, ...]:
        return self.whole.weights

    def is_current(self) -> bool:
        """Whether no weight has been given other memory, as `.to()` and `.half()` do."""
        return all(w.data_ptr() == p for w, p in zip(self.weights, self.pointers, strict=True))


def bind(
    families: Families,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    include_bias: bool,
) -> Bound:
    """Build the plan, and one more for each parameter group where several hold coupled weights.

    Raises:
        StateError: a coupled weight cannot be walked, or none is left to walk.
    """
    number = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
    whole_plan = build_plan(families, parameters, include_bias=include_bias)
    if not whole_plan.names:
        raise StateError("no coupled weight is left: nothing can be scored")
    total = sum(parameters[name].numel() for name in whole_plan.names)

    def part(plan: Plan, group: int) -> Part:
        weights = tuple(parameters[name] for name in plan.names)
        scratch = torch.zeros(2, dtype=torch.float32, device=plan.tables.device)
        share = sum(w.numel() for w in weights) / total
        return Part(plan, weights, group, share, scratch[0], scratch[1])

    groups = sorted({number[id(parameters[name])] for name in whole_plan.names})
    parts = []
    for group in groups if len(groups) > 1 else ():
        mine = {name for name in whole_plan.names if number[id(parameters[name])] == group}
        axes = tuple(axis for axis in families.axes if axis.tensor in mine)
        plan = build_plan(replace(families, axes=axes), parameters, include_bias=include_bias)
        parts.append(part(plan, group))
    whole = part(whole_plan, groups[0])
    pointers = tuple(w.data_ptr() for w in whole.weights)
    return Bound(whole, tuple(parts) or (whole,), pointers)


def check_identity(bound: Bound, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Refuse weights that are no longer those that were attached.

    Raises:
        StateError: a parameter was replaced by another object, or left the optimizer.
    """
    mine = {id(p) for p in owned(optimizer)}
    for name, weight in zip(bound.plan.names, bound.weights, strict=True):
        if parameters.get(name) is not weight:
            raise StateError(
                f"{name} is not the parameter that was attached: it has been replaced since. "
                "Call ocsfast.detach(model), and attach again with an optimizer that owns the new one"
            )
        if id(weight) not in mine:
            raise StateError(f"{name} is no longer owned by the {type(optimizer).__name__} optimizer")


def parts_now(bound: Bound, optimizer: Optimizer) -> tuple[Part, ...]:
    """One part where all parameter groups agree on learning rate and momentum, else one a group."""
    rates = [learning_rate(optimizer.param_groups[p.group]) for p in bound.parts]
    gains = [momentum_gain(optimizer.param_groups[p.group]) for p in bound.parts]
    alike = all(same_scalar(r, rates[0]) for r in rates) and len(set(gains)) == 1
    return (bound.whole,) if alike else bound.parts


def mean_rate(parts: Sequence[Part], optimizer: Optimizer) -> Scalar:
    """The learning rate, averaged over the coupled weights' elements."""
    if len(parts) == 1:
        return learning_rate(optimizer.param_groups[parts[0].group])
    total: Scalar = 0.0
    for part in parts:
        total = total + part.share * learning_rate(optimizer.param_groups[part.group])
    return total


def lambda_for(rate: Scalar, shrinkage: float) -> Scalar:
    """The lambda with lambda * rate = shrinkage; 0 where the rate is 0."""
    if isinstance(rate, Tensor):
        return torch.where(rate > 0, shrinkage / rate, torch.zeros_like(rate))
    return shrinkage / rate if rate > 0 else 0.0


def add_lasso(
    parts: Sequence[Part], optimizer: Optimizer, mask: Tensor, lam: Scalar, scale: float | None
) -> None:
    """Eq. 8: grad += lambda * w / |w| over the pruned slices, before the optimizer reads it.

    Args:
        scale: a typical slice norm. Given, the term is scaled by it and by 1 - momentum, so that it
            takes from such a slice the same share a step as Eq. 9 does. None: Eq. 8 as written.
    """
    unscale = gradient_scale(optimizer)
    for part in parts:
        gain = 1.0
        if scale is not None:
            gain = scale * momentum_gain(optimizer.param_groups[part.group])
        _fill(part.strength, lam * gain)
        if unscale is not None:
            part.strength.mul_(unscale.to(part.strength.device))
        grads = [w.grad if _dense(w.grad) else None for w in part.weights]
        ops.lasso_grad_(part.plan, grads, part.weights, mask, part.strength)


def shrink(parts: Sequence[Part], optimizer: Optimizer, mask: Tensor, lam: Scalar) -> None:
    """Eq. 9: pruned slices times 1 - lambda * lr, by each parameter group's own lr, never below 0."""
    skipped = overflowed(optimizer)
    for part in parts:
        rate = learning_rate(optimizer.param_groups[part.group])
        _fill(part.factor, lam * rate)
        part.factor.clamp_(0.0, 1.0)
        if skipped is not None:
            part.factor.mul_((skipped == 0).to(part.factor.device))
        part.factor.neg_().add_(1.0)
        ops.shrink_(part.plan, part.weights, mask, part.factor)


def _fill(scratch: Tensor, value: Scalar) -> None:
    if isinstance(value, Tensor):
        scratch.copy_(value)
    else:
        scratch.fill_(value)


def _dense(grad: Tensor | None) -> bool:
    # A sparse gradient names the rows it touches; Eq. 8 would make it dense.
    return grad is not None and grad.layout is torch.strided
