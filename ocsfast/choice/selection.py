"""What is to go: the partition that meets a budget, and how it compares with earlier ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from ocsfast.choice.budget import MUCH, Aim, overshoot, with_multiple
from ocsfast.choice.saliency import saliency
from ocsfast.core.criteria import Criterion
from ocsfast.core.errors import StateError
from ocsfast.core.families import Families
from ocsfast.ops import functions as ops
from ocsfast.ops.bound import Weights

NAN = 2  # bit of a partition's status; bit 1, unreachable, shows in the cost


@dataclass(frozen=True, eq=False)
class Choice:
    """One partition: what a check measures before it decides anything."""

    scores: Tensor  # [groups] by the criterion
    mask: Tensor  # [groups] bool, true where a group goes
    cost: int
    residual: float  # mean Eq. 2 of the pruned groups / of the kept ones
    stability: float | None  # Eq. 3, against the mask of `lag` checks ago
    changed: int  # groups on another side than at the check before
    kept: tuple[int, ...]  # groups that stay, a family


def choose(
    aim: Aim,
    bound: Weights,
    criterion: Criterion = "l2",
    optimizer: Optimizer | None = None,
    before: Sequence[Tensor] = (),
    lag: int = 1,
) -> Choice:
    """Score the groups, choose which go, and compare with the choices before.

    Three launches, unless scores are normalized, weighed by cost or tied, and one read: one wait for the
    device.

    Args:
        aim: the budget.
        bound: plan and weights.
        criterion, optimizer: as for `saliency`.
        before: the masks of earlier checks, the oldest first, `lag` of them at most.
        lag: i of Eq. 3, in checks.

    Raises:
        StateError: a weight is NaN or infinite (the first such is named), or the criterion lacks
            something.
    """
    plan = bound.plan
    placed = aim.on(plan.tables.device)
    bound.forget()  # a check is rare, and what it decides is final: it reads the weights themselves
    raw, sizes = saliency(bound, criterion, optimizer)
    scores = aim.ranking.ranked(raw)
    mask, cost, status = ops.partition(
        plan,
        placed.cost_model,
        scores,
        placed.limits,
        placed.budget,
        placed.units,
        placed.ties,
        aim.give_back,
    )
    full = len(before) == lag
    first, last = before[0] if full else None, before[-1] if before else None
    facts = ops.compare(plan, mask, sizes, cost, status, first, last)
    read = facts.tolist()  # the one place that waits for the device
    cost_read, status_read, gone_read, of_gone, of_all, index_read, changed_read, *kept_read = read
    if int(status_read) & NAN or not math.isfinite(of_all):
        name = bound.not_finite()
        what = f"{name} holds NaN or infinite values" if name else "the squares of the weights overflow"
        raise StateError(f"{what}: the training has diverged")
    mean_kept = (of_all - of_gone) / max(1.0, mask.numel() - gone_read)
    mean_gone = of_gone / max(1.0, gone_read)
    return Choice(
        scores,
        mask,
        int(cost_read),
        mean_gone / mean_kept if mean_kept > 0 else 0.0,
        index_read if full else None,
        int(changed_read),
        tuple(int(count) for count in kept_read),
    )


def mean_pruned_norm(bound: Weights, mask: Tensor) -> float:
    """Mean L2 norm of the slices of the groups that go; the squares are at hand after a check."""
    _, slice_sq = ops.group_saliency(bound)
    norms = slice_sq[mask[bound.plan.table("slice_group").long()]].sqrt()
    return float(norms.mean()) if norms.numel() else 0.0


def with_fitting_multiple(
    aim: Aim, families: Families, parameters: Mapping[str, Tensor], bound: Weights
) -> Aim:
    """An aim of `round_to="auto"` with the largest multiple that meets the budget, and little more.

    By the weights as they are. The multiple that the device likes is halved until it does; where none
    does, the one that takes least beyond the budget is taken, and else 1.
    """
    nearest: Aim | None = None
    most = 0
    while True:
        cost = choose(aim, bound).cost
        if cost <= aim.budget:
            if overshoot(aim, cost) <= MUCH:
                return aim
            if nearest is None or cost > most:
                nearest, most = aim, cost
        if aim.multiple == 1:
            return nearest or aim
        aim = with_multiple(aim, families, parameters, "auto", aim.multiple // 2)
