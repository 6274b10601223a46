"""Plain-torch twins of `ocsfast.ops.functions`: the same signatures and meaning, without the extension.

Written to be read: tests and benchmarks hold the kernels against them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ocsfast.core.criteria import CRITERIA
from ocsfast.ops.bound import Bound
from ocsfast.ops.cost import CostModel
from ocsfast.ops.functions import Penalty
from ocsfast.ops.plan import Plan
from ocsfast.ops.tables import group_scores, lasso_slopes, matrices, slice_sums


def group_saliency(
    bound: Bound, criterion: str = "l2", others: Sequence[Tensor | None] = ()
) -> tuple[Tensor, Tensor]:
    """Eq. 2 and other criteria; see `ocsfast.ops.functions.group_saliency`."""
    formula = CRITERIA[criterion]
    wide = any(weight.dtype == torch.float64 for weight in bound.weights)
    dtype = torch.float64 if wide else torch.float32
    elements = []
    for weight, other in zip(bound.weights, others or bound.weights, strict=True):
        w = weight.detach().to(dtype)
        x = torch.zeros_like(w) if other is None else other.detach().to(dtype)
        elements.append(formula.element(w, x) if other is not None else x)
    sums = slice_sums(bound.plan, elements, dtype, formula.reduce)
    return group_scores(bound.plan, sums, criterion), sums


def partition(
    plan: Plan,
    cost_model: CostModel,
    scores: Tensor,
    limits: Tensor,
    budget: Tensor,
    units: Tensor | None = None,
    ties: Tensor | None = None,
    give_back: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower the threshold group by group; see `ocsfast.ops.functions.partition`. Quadratic."""
    sizes = plan.table("family_start").diff().tolist()
    families = range(len(sizes))
    family = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).tolist()
    first = list(families) if ties is None else ties.tolist()
    wanted = [1 for _ in families] if units is None else units.tolist()
    unit = [max(1, min(number, size)) for number, size in zip(wanted, sizes, strict=True)]
    values = scores.tolist()
    order = sorted(range(len(values)), key=lambda g: (values[g], g))
    held: dict[int, int] = {}  # the first of tied families -> how many groups each of them loses

    def gone(threshold: int) -> list[int]:
        """How many groups each family loses."""
        most = [0 for _ in families]
        for f in families:
            below = sum(family[g] == f for g in order[:threshold])
            most[first[f]] = max(most[first[f]], below)
        counts = [min(most[first[f]], max(0, int(limits[f]))) for f in families]
        for f in families:
            while counts[f] > 0 and (sizes[f] - counts[f]) % unit[f] != 0:
                counts[f] -= 1
        return [held.get(first[f], counts[f]) for f in families]

    def cost(counts: Sequence[int]) -> int:
        return cost_model([size - n for size, n in zip(sizes, counts, strict=True)])

    def result(counts: Sequence[int], status: int) -> tuple[Tensor, Tensor, Tensor]:
        lowest = [[g for g in order if family[g] == f][:n] for f, n in enumerate(counts)]
        mask = torch.zeros(len(family), dtype=torch.bool)
        mask[[g for groups in lowest for g in groups]] = True
        number = torch.tensor(cost(counts), device=scores.device)
        return mask.to(scores.device), number, torch.tensor(status, dtype=torch.int32).to(scores.device)

    if bool(scores.isnan().any()):
        return result([0 for _ in families], 2)
    threshold = len(order)
    if cost(gone(threshold)) > int(budget):
        return result(gone(threshold), 1)
    while True:
        while threshold > 0 and cost(gone(threshold - 1)) <= int(budget):
            threshold -= 1
        if threshold == 0 or not give_back:
            return result(gone(threshold), 0)
        f = family[order[threshold - 1]]
        held[first[f]] = gone(threshold)[f]


def shrink_(bound: Bound, mask: Tensor, factor: Tensor) -> None:
    """Eq. 9; see `ocsfast.ops.functions.shrink_`."""
    plan = bound.plan
    with torch.no_grad():
        for weight, rows, cols in matrices(plan, bound.weights):
            dtype = _accumulator(weight.dtype)
            once = factor.to(weight.device, dtype)
            factors = torch.stack([torch.ones_like(once), once, once * once])
            times = torch.zeros((), dtype=torch.int64, device=weight.device)
            for labels, axis in ((rows, 0), (cols, 1)):
                if labels is not None:
                    times = times + _along(_pruned(plan, labels, mask).long(), weight, axis)
            weight.copy_((weight.to(dtype) * factors[times]).to(weight.dtype))


def lasso_grad_(bound: Bound, grads: Sequence[Tensor | None], mask: Tensor, lam: Tensor) -> None:
    """Eq. 8; see `ocsfast.ops.functions.lasso_grad_`."""
    plan, weights = bound.plan, bound.weights
    with torch.no_grad():
        squares = slice_sums(plan, [w.double().square() for w in weights], torch.float64)
        slopes = lasso_slopes(plan, squares, mask, lam)
        for grad, (weight, rows, cols) in zip(grads, matrices(plan, weights), strict=True):
            if grad is None:
                continue
            dtype = _accumulator(weight.dtype)
            total = torch.zeros((), dtype=dtype, device=weight.device)
            for labels, axis in ((rows, 0), (cols, 1)):
                if labels is not None:
                    total = total + _along(slopes[labels].to(dtype), weight, axis)
            before = grad.to(dtype).reshape(weight.shape)
            after = torch.where(total != 0, before + weight.to(dtype) * total, before)
            grad.copy_(after.reshape(grad.shape))


def sgd_step_(
    bound: Bound,
    grads: Sequence[Tensor | None],
    momenta: Sequence[Tensor | None],
    lr: Tensor,
    *,
    first: Sequence[int] = (),
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    penalty: Penalty | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """SGD with Eq. 8 before and Eq. 9 after it; see `ocsfast.ops.functions.sgd_step_`."""
    with torch.no_grad():
        if found_inf is not None and bool(found_inf):
            return
        used = [None if grad is None else (-grad if maximize else grad.clone()) for grad in grads]
        if grad_scale is not None:
            used = [None if grad is None else grad / grad_scale for grad in used]
        if penalty is not None:
            lasso_grad_(bound, used, penalty.mask, penalty.lam)
        for t, (weight, grad, buffer) in enumerate(zip(bound.weights, used, momenta, strict=True)):
            if grad is None:
                continue
            grad = grad.add(weight, alpha=weight_decay)
            if buffer is not None:
                if t in first:
                    buffer.copy_(grad)
                else:
                    buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
                grad = grad.add(buffer, alpha=momentum) if nesterov else buffer
            weight.sub_((lr.to(grad) if grad.dtype == torch.float64 else lr.float()) * grad)
        if penalty is not None:
            shrink_(bound, penalty.mask, penalty.factor)


def adamw_step_(
    bound: Bound,
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor | None],
    exp_avg_sqs: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    lr: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    penalty: Penalty | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """AdamW with Eq. 8 before and Eq. 9 after it; see `ocsfast.ops.functions.adamw_step_`."""
    with torch.no_grad():
        if found_inf is not None and bool(found_inf):
            return
        used = [None if g is None else g.to(_accumulator(g.dtype), copy=True) for g in grads]
        if grad_scale is not None:
            used = [None if g is None else g / grad_scale for g in used]
        if maximize:
            used = [None if g is None else -g for g in used]
        if penalty is not None:
            lasso_grad_(bound, used, penalty.mask, penalty.lam)
        for weight, grad, exp_avg, exp_avg_sq, step in zip(
            bound.weights, used, exp_avgs, exp_avg_sqs, steps, strict=True
        ):
            if grad is None or exp_avg is None or exp_avg_sq is None or step is None:
                continue
            step += 1
            count = float(step)
            average = exp_avg.to(grad.dtype).lerp(grad, 1 - betas[0])
            square = exp_avg_sq.to(grad.dtype) * betas[1] + (1 - betas[1]) * grad.square()
            corrected = square.sqrt() / (1 - betas[1] ** count) ** 0.5
            change = float(lr) / (1 - betas[0] ** count) * average / (corrected + eps)
            weight.copy_(weight.to(grad.dtype) * (1 - float(lr) * weight_decay) - change)
            exp_avg.copy_(average)
            exp_avg_sq.copy_(square)
        if penalty is not None:
            shrink_(bound, penalty.mask, penalty.factor)


def compare(
    plan: Plan,
    mask: Tensor,
    sizes: Tensor,
    cost: Tensor,
    status: Tensor,
    first: Tensor | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """Eq. 3 and what else a check reads; see `ocsfast.ops.functions.compare`."""
    counts = plan.table("family_start").diff().tolist()
    kept = [int((~part).sum()) for part in torch.split(mask, counts)]
    facts = [
        float(cost),
        float(status),
        int(mask.sum()),
        float(sizes[mask].double().sum()),
        float(sizes.double().sum()),
        _jaccard(plan, mask if first is None else first, mask),
        0 if last is None else int((last != mask).sum()),
        *kept,
    ]
    return torch.tensor(facts, dtype=torch.float64, device=mask.device)


def _jaccard(plan: Plan, mask_a: Tensor, mask_b: Tensor) -> float:
    sizes, layers = plan.table("family_start").diff().tolist(), plan.table("family_layers").tolist()
    alike = []
    for a, b in zip(torch.split(mask_a, sizes), torch.split(mask_b, sizes), strict=True):
        both, either = int((~a & ~b).sum()), int((~a | ~b).sum())
        alike.append(both / either if either > 0 else 1.0)
    weighted = sum(index * weight for index, weight in zip(alike, layers, strict=True))
    return weighted / sum(layers) if sum(layers) > 0 else 1.0


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pruned(plan: Plan, labels: Tensor, mask: Tensor) -> Tensor:
    """Whether each index along an axis lies in a slice of a pruned group: bool."""
    of_slice = torch.cat([mask[plan.table("slice_group").long()], mask.new_zeros(1)])
    return of_slice[labels]


def _along(values: Tensor, weight: Tensor, axis: int) -> Tensor:
    """One value an index of `axis`, shaped to broadcast over the weight."""
    return values.view([-1 if d == axis else 1 for d in range(weight.dim())])
