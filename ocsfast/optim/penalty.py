"""Eq. 8 and Eq. 9 on a model's weights: what the optimizer hooks of a pruner do.

Nothing here waits for the device: strengths and factors are 0-dim device tensors, filled by value.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ocsfast.core.errors import StateError
from ocsfast.core.families import Families
from ocsfast.ops.functions import Bound, Penalty, Weights
from ocsfast.ops.plan import Plan, build_plan
from ocsfast.optim import OnePass
from ocsfast.optim.one_pass import fill, is_sparse, walkable
from ocsfast.optim.owners import (
    Scalar,
    gradient_scale,
    learning_rate,
    momentum_gain,
    overflowed,
    owned,
    same_scalar,
)

WeightsOf = Callable[[Plan, Sequence[Tensor]], Weights]


@dataclass(frozen=True, eq=False)
class Part:
    """Coupled weights whose learning rate is that of one parameter group."""

    bound: Weights
    group: int  # number of the optimizer's parameter group
    share: float  # of all coupled weights' elements
    strength: Tensor  # 0-dim float32, scratch: what multiplies Eq. 8's direction
    factor: Tensor  # 0-dim float32, scratch: what Eq. 9 multiplies by


@dataclass(frozen=True, eq=False)
class Coupled:
    """The plan with the weights it walks, as they lie in memory now."""

    whole: Part
    parts: tuple[Part, ...]  # by parameter group; only `whole` where one group holds them all
    pointers: tuple[int, ...]

    @property
    def bound(self) -> Weights:
        return self.whole.bound

    def forget(self) -> None:
        """The weights have changed: some of torch's own optimizers do not raise their version."""
        for part in (self.whole, *self.parts):
            part.bound.forget()

    def is_current(self) -> bool:
        """Whether no weight has been given other memory, as `.to()` and `.half()` do."""
        return self.bound.pointers() == self.pointers


def bind(
    families: Families,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    include_bias: bool,
    weights_of: WeightsOf = Bound,
) -> Coupled:
    """Build the plan, and one more for each parameter group where several hold coupled weights.

    For an optimizer of `ocsfast.optim` a group's plan takes in its other parameters too, so that one
    pass steps all.

    Raises:
        StateError: a coupled weight cannot be walked, or none is left to walk.
    """
    number = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
    coupled = build_plan(families, parameters, include_bias=include_bias)
    if not coupled.names:
        raise StateError("no coupled weight is left: nothing can be scored")
    total = sum(parameters[name].numel() for name in coupled.names)
    group_of = {name: number[id(parameters[name])] for name in coupled.names}
    groups = sorted(set(group_of.values()))

    def part(names: Container[str], group: int, alone: bool) -> Part:
        others: list[str] = []
        if alone and isinstance(optimizer, OnePass):
            first = parameters[coupled.names[0]]
            mine = {id(p): name for name, p in parameters.items() if number.get(id(p)) == group}
            others = [name for name in mine.values() if walkable(parameters[name], first)]
        axes = tuple(axis for axis in families.axes if axis.tensor in names)
        plan = build_plan(
            replace(families, axes=axes), parameters, include_bias=include_bias, others=others
        )
        scratch = torch.zeros(2, dtype=torch.float32, device=plan.tables.device)
        return Part(
            weights_of(plan, [parameters[name] for name in plan.names]),
            group,
            sum(parameters[name].numel() for name in coupled.names if name in names) / total,
            scratch[0],
            scratch[1],
        )

    whole = part(coupled.names, groups[0], len(groups) == 1)
    parts = []
    for group in groups if len(groups) > 1 else ():
        parts.append(part({name for name in coupled.names if group_of[name] == group}, group, True))
    return Coupled(whole, tuple(parts) or (whole,), whole.bound.pointers())


def check_identity(
    coupled: Coupled, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> None:
    """Refuse weights that are no longer those that were attached.

    Raises:
        StateError: a parameter was replaced by another object, or left the optimizer.
    """
    mine = {id(p) for p in owned(optimizer)}
    bound = coupled.bound
    for name, weight in zip(bound.plan.names, bound.weights, strict=True):
        if parameters.get(name) is not weight:
            raise StateError(
                f"{name} is not the parameter that was attached: it has been replaced since. "
                "Call ocsfast.detach(model), and attach again with an optimizer that owns the new one"
            )
        if id(weight) not in mine:
            raise StateError(f"{name} is no longer owned by the {type(optimizer).__name__} optimizer")


def parts_now(coupled: Coupled, optimizer: Optimizer) -> tuple[Part, ...]:
    """One part where all parameter groups agree on learning rate and momentum, else one a group."""
    groups = [optimizer.param_groups[p.group] for p in coupled.parts]
    rates, gains = [learning_rate(g) for g in groups], [momentum_gain(g) for g in groups]
    alike = all(same_scalar(r, rates[0]) for r in rates) and len(set(gains)) == 1
    alike = alike and len({g.get("maximize", False) for g in groups}) == 1
    return (coupled.whole,) if alike and not isinstance(optimizer, OnePass) else coupled.parts


def mean_rate(parts: Sequence[Part], optimizer: Optimizer) -> Scalar:
    """The learning rate, averaged over the coupled weights' elements."""
    if len(parts) == 1:
        return learning_rate(optimizer.param_groups[parts[0].group])
    total: Scalar = 0.0
    for part in parts:
        total = total + part.share * learning_rate(optimizer.param_groups[part.group])
    return total


def lambda_for(rate: Scalar, shrinkage: Scalar) -> Scalar:
    """The lambda with lambda * rate = shrinkage; 0 where the rate is 0."""
    if isinstance(rate, Tensor):
        return torch.where(rate > 0, shrinkage / rate, torch.zeros_like(rate))
    return shrinkage / rate if rate > 0 else 0.0


def prepare(
    parts: Sequence[Part], optimizer: Optimizer, lam: Scalar, scale: Scalar | None, penalty: str
) -> None:
    """Fill in what the coming step is to do to each part: Eq. 8's strength and Eq. 9's factor.

    Args:
        scale: a typical slice norm. Given, Eq. 8 is scaled by it and by 1 - momentum, so that it takes
            from such a slice the same share a step as Eq. 9 does. None: Eq. 8 as written.
        penalty: `Config.penalty`.
    """
    for part in parts:
        group = optimizer.param_groups[part.group]
        gain = 1.0 if scale is None else scale * momentum_gain(group)
        fill(part.strength, lam * gain if penalty in ("both", "lasso") else 0.0)
        # 1 - lambda * lr by each parameter group's own lr, never below 0.
        fill(part.factor, lam * learning_rate(group) if penalty in ("both", "shrink") else 0.0)
        part.factor.clamp_(0.0, 1.0).neg_().add_(1.0)


def hand_over(parts: Sequence[Part], optimizer: OnePass, mask: Tensor) -> None:
    """Let the optimizer do both in its own pass."""
    optimizer.penalize(
        {
            part.group: (part.bound, Penalty(mask, part.strength, part.factor))
            for part in parts
            if isinstance(part.bound, Bound)  # its kernel walks no other
        }
    )


def add_lasso(parts: Sequence[Part], optimizer: Optimizer, mask: Tensor) -> None:
    """Eq. 8: grad += lambda * w / |w| over the pruned slices, before the optimizer reads it."""
    unscale = gradient_scale(optimizer)
    for part in parts:
        strength = part.strength
        if unscale is not None:
            strength = strength * unscale.to(strength)
        if optimizer.param_groups[part.group].get("maximize", False):
            strength = -strength  # the optimizer climbs, the weights are to shrink
        # Eq. 8 would make a sparse gradient dense.
        grads = [None if is_sparse(w.grad) else w.grad for w in part.bound.weights]
        part.bound.add_lasso(grads, mask, strength)


def shrink(parts: Sequence[Part], optimizer: Optimizer, mask: Tensor) -> None:
    """Eq. 9: pruned slices times the factor, unless the optimizer skipped its step."""
    skipped = overflowed(optimizer)
    for part in parts:
        if skipped is not None:
            part.factor.copy_(part.factor.where((skipped == 0).to(part.factor.device), 1.0))
        part.bound.shrink(mask, part.factor)
