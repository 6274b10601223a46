"""The weights that shrink, bound to plans: one for all, and one for each param group."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ocsfast.core.errors import StateError
from ocsfast.core.families import Families
from ocsfast.ops.bound import Bound, Weights
from ocsfast.ops.plan import Plan
from ocsfast.ops.planning import build_plan
from ocsfast.optim.one_pass import walkable
from ocsfast.optim.owners import owned
from ocsfast.optim.param_groups import Scalar, learning_rate, momentum_gain, same_scalar
from ocsfast.optim.scalars import scalar

WeightsOf = Callable[[Plan, Sequence[Tensor]], Weights]


@dataclass(eq=False)
class Part:
    """Coupled weights whose learning rate is that of one param group.

    `prepare` sets for each step what it does to them.
    """

    bound: Weights
    param_group: int  # its number
    share: float  # of all coupled weights' elements
    lam: Tensor  # 0-dim float32, on the CPU or where the weights lie: what multiplies Eq. 8's direction
    factor: Tensor  # the same: what Eq. 9 multiplies by


@dataclass(frozen=True, eq=False)
class Coupled:
    """The plan with the weights it walks, as they lie in memory now."""

    whole: Part
    parts: tuple[Part, ...]  # one for each param group; only `whole` where one holds them all
    pointers: tuple[int, ...]

    @property
    def bound(self) -> Weights:
        return self.whole.bound

    @property
    def device(self) -> torch.device:
        return self.bound.plan.tables.device

    def forget(self) -> None:
        """The weights have changed: some of torch's own optimizers do not raise their version."""
        for part in (self.whole, *self.parts):
            part.bound.forget()

    def is_current(self) -> bool:
        """Whether no weight has been given other memory, as `.to()` and `.half()` do."""
        return self.bound.pointers() == self.pointers


def steps_in_one_pass(optimizer: Optimizer) -> bool:
    """Whether the optimizer applies the penalty in its own pass, as those of `ocsfast.optim` do."""
    return hasattr(optimizer, "penalize")


def bind(
    families: Families,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    include_bias: bool,
    weights_of: WeightsOf = Bound,
) -> Coupled:
    """Build the plan, and one more for each param group where several hold coupled weights.

    If the optimizer steps in one pass, a param group's plan takes in its other parameters too, so that
    one pass steps all.

    Args:
        families: of the model.
        parameters: `dict(model.named_parameters())`.
        optimizer: which owns them.
        include_bias: `Config.include_bias`.
        weights_of: what binds a plan to its weights; another one than `Bound` where these are sharded.

    Raises:
        StateError: a coupled weight cannot be walked, or none is left to walk.
    """
    number = {id(p): k for k, held in enumerate(optimizer.param_groups) for p in held["params"]}
    coupled = build_plan(families, parameters, include_bias=include_bias)
    if not coupled.names:
        raise StateError("no coupled weight is left: nothing can be scored")
    total = sum(parameters[name].numel() for name in coupled.names)
    holder = {name: number[id(parameters[name])] for name in coupled.names}
    param_groups = sorted(set(holder.values()))

    def part(names: Container[str], param_group: int, alone: bool) -> Part:
        others: list[str] = []
        if alone and steps_in_one_pass(optimizer):
            first = parameters[coupled.names[0]]
            mine = {id(p): name for name, p in parameters.items() if number.get(id(p)) == param_group}
            others = [name for name in mine.values() if walkable(parameters[name], first)]
        axes = tuple(axis for axis in families.axes if axis.tensor in names)
        own = replace(families, axes=axes)
        plan = build_plan(own, parameters, include_bias=include_bias, others=others)
        elements = sum(parameters[name].numel() for name in coupled.names if name in names)
        weights = weights_of(plan, [parameters[name] for name in plan.names])
        return Part(
            weights,
            param_group,
            elements / total,
            scalar(0.0, plan.tables.device),
            scalar(1.0, plan.tables.device),
        )

    whole = part(coupled.names, param_groups[0], len(param_groups) == 1)
    parts = []
    for k in param_groups if len(param_groups) > 1 else ():
        parts.append(part({name for name in coupled.names if holder[name] == k}, k, True))
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


def parts_now(coupled: Coupled, optimizer: Optimizer, apart: bool) -> tuple[Part, ...]:
    """One part where all param groups agree on learning rate and momentum, else one for each.

    Args:
        apart: one for each in any case.
    """
    if apart:
        return coupled.parts
    param_groups = [optimizer.param_groups[p.param_group] for p in coupled.parts]
    rates, gains = [learning_rate(g) for g in param_groups], [momentum_gain(g) for g in param_groups]
    alike = all(same_scalar(r, rates[0]) for r in rates) and len(set(gains)) == 1
    alike = alike and len({g.get("maximize", False) for g in param_groups}) == 1
    return (coupled.whole,) if alike else coupled.parts


def mean_rate(parts: Sequence[Part], optimizer: Optimizer) -> Scalar:
    """The learning rate, averaged over the coupled weights' elements."""
    if len(parts) == 1:
        return learning_rate(optimizer.param_groups[parts[0].param_group])
    total: Scalar = 0.0
    for part in parts:
        total = total + part.share * learning_rate(optimizer.param_groups[part.param_group])
    return total
