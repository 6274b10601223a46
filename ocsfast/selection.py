"""What is to go: the budget, and the partition of the groups that meets it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ocsfast import ops
from ocsfast.config import Config, budget_of
from ocsfast.cost import CostModel, build_cost_model, parameter_products
from ocsfast.errors import ConfigError, StateError
from ocsfast.grouping.families import Families
from ocsfast.penalty import Bound

NAN = 2  # bit of a partition's status; bit 1, unreachable, shows in the cost


@dataclass(frozen=True, eq=False)
class Aim:
    """A ratio of a model's cost, in integers."""

    cost_model: CostModel
    dense: int
    budget: int  # the highest cost that still removes the ratio
    limits: tuple[int, ...]  # most groups each family may lose


@dataclass(frozen=True, eq=False)
class Choice:
    """One partition: what a check measures before it decides anything."""

    scores: Tensor  # [groups] Eq. 2
    slice_sq: Tensor  # [slices] sums of squares
    mask: Tensor  # [groups] bool, true where a group goes
    cost: int
    residual: float  # mean score of the pruned groups / of the kept ones


def make_aim(
    families: Families, parameters: Mapping[str, nn.Parameter], config: Config, ratio: float
) -> Aim:
    """The cost model of `config.target`, and what `ratio` of it means (Eq. 1)."""
    if callable(config.target):
        products, unit = tuple(config.target(families)), "cost units"
    elif config.target == "flops":
        products, unit = families.macs, "MACs"
    else:
        products, unit = parameter_products(families, parameters), "parameters"
    model = build_cost_model(families, products, unit)
    dense = model([family.size for family in families.families])
    limits = tuple(
        min(int(config.max_family_ratio * family.size), max(0, family.size - 1))
        for family in families.families
    )
    return Aim(model, dense, budget_of(dense, ratio), limits)


def choose(aim: Aim, bound: Bound, config: Config) -> Choice:
    """Eq. 2 and the partition, on the weights as they are.

    Raises:
        StateError: a weight is NaN or infinite; the first such is named.
    """
    plan, device = bound.plan, bound.plan.tables.device
    squared = config.criterion == "l2_squared"
    scores, slice_sq = ops.group_saliency(plan, bound.weights, squared=squared)
    mask, cost, status = ops.partition(
        plan,
        aim.cost_model.to(device),
        scores,
        torch.tensor(aim.limits, dtype=torch.int64, device=device),
        torch.tensor(aim.budget, dtype=torch.int64, device=device),
        config.round_to,
    )
    if int(status) & NAN or not bool(torch.isfinite(slice_sq).all()):
        for name, weight in zip(plan.names, bound.weights, strict=True):
            if not bool(torch.isfinite(weight).all()):
                raise StateError(f"{name} holds NaN or infinite values: the training has diverged")
        raise StateError("the squares of the weights overflow: the training has diverged")
    kept, gone = float(scores[~mask].mean()), scores[mask]
    residual = float(gone.mean()) / kept if gone.numel() and kept > 0 else 0.0
    return Choice(scores, slice_sq, mask, int(cost), residual)


def require_reachable(
    aim: Aim, choice: Choice, families: Families, config: Config, ratio: float
) -> None:
    """Refuse a ratio that the limits do not allow, naming the largest that they do.

    Raises:
        ConfigError: the choice, which is all that may go where the budget is out of reach, is too dear.
    """
    if choice.cost <= aim.budget:
        return
    most = 1000 * (aim.dense - choice.cost) // max(1, aim.dense) / 1000
    rounding = f", round_to={config.round_to}" if config.round_to > 1 else ""
    layers = len({frozen.where for frozen in families.frozen})
    kept = f"{layers} layer{'' if layers == 1 else 's'} kept"
    raise ConfigError(
        f"ratio={ratio:g} cannot be reached: with max_family_ratio={config.max_family_ratio:g}"
        f"{rounding} and {kept} at most {most:g} of {quantity(aim.dense)}{aim.cost_model.unit} can go. "
        "Lower the ratio, raise max_family_ratio, or shorten keep="
    )


def kept_by_family(families: Families, mask: Tensor) -> tuple[tuple[str, int, int], ...]:
    """(family, groups kept, groups before), family by family."""
    gone = mask.cpu()
    return tuple(
        (f.name, f.size - int(gone[f.first : f.first + f.size].sum()), f.size) for f in families.families
    )


def mean_pruned_norm(bound: Bound, choice: Choice) -> float:
    """Mean L2 norm of the slices of the groups that go."""
    goes = choice.mask[bound.plan.table("slice_group").long()]
    norms = choice.slice_sq[goes].sqrt()
    return float(norms.mean()) if norms.numel() else 0.0


def quantity(value: int) -> str:
    """A count for people, to be followed by its unit: 4089184256 is "4.09 G"."""
    for unit, prefix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {prefix}"
    return f"{value} "
