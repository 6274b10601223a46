"""Plain-torch twins of `ocsfast.ops`: the same signatures and meaning, without the extension.

Written to be read: tests and benchmarks hold the kernels against them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ocsfast.cost import CostModel
from ocsfast.plan import Plan


def group_saliency(
    plan: Plan, weights: Sequence[Tensor], *, squared: bool = False
) -> tuple[Tensor, Tensor]:
    """Eq. 2; see `ocsfast.ops.group_saliency`."""
    wide = any(weight.dtype == torch.float64 for weight in weights)
    dtype = torch.float64 if wide else torch.float32
    slice_sq = _slice_squares(plan, weights, dtype)
    norm = slice_sq if squared else slice_sq.sqrt()
    term = norm / plan.table("slice_size").clamp(min=1).to(dtype).sqrt()
    sums = term.new_zeros(plan.count("groups")).index_add_(0, plan.table("slice_group"), term)
    return sums / plan.table("group_start").diff().clamp(min=1), slice_sq


def partition(
    plan: Plan,
    cost_model: CostModel,
    scores: Tensor,
    limits: Tensor,
    budget: Tensor,
    round_to: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Try every threshold in ascending order; see `ocsfast.ops.partition`. Quadratic."""
    sizes = plan.table("family_start").diff().tolist()
    family = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).tolist()
    none = torch.zeros(len(family), dtype=torch.bool)

    def result(mask: Tensor, cost: int, status: int) -> tuple[Tensor, Tensor, Tensor]:
        device = scores.device
        return (
            mask.to(device),
            torch.tensor(cost, device=device),
            torch.tensor(status, dtype=torch.int32, device=device),
        )

    if bool(scores.isnan().any()):
        return result(none, cost_model(sizes), 2)
    values = scores.tolist()
    order = sorted(range(len(values)), key=lambda g: (values[g], g))
    for threshold in range(len(order) + 1):
        mask, kept = none.clone(), []
        for f, size in enumerate(sizes):
            below = [g for g in order[:threshold] if family[g] == f]
            gone = min(len(below), max(0, int(limits[f])))
            while gone > 0 and (size - gone) % round_to != 0:
                gone -= 1
            mask[below[:gone]] = True
            kept.append(size - gone)
        if cost_model(kept) <= int(budget):
            return result(mask, cost_model(kept), 0)
    return result(mask, cost_model(kept), 1)


def shrink_(plan: Plan, weights: Sequence[Tensor], mask: Tensor, factor: Tensor) -> None:
    """Eq. 9; see `ocsfast.ops.shrink_`."""
    with torch.no_grad():
        for weight, rows, cols in _slices(plan, weights):
            dtype = _accumulator(weight.dtype)
            once = factor.to(dtype)
            factors = torch.stack([torch.ones_like(once), once, once * once])
            times = torch.zeros((), dtype=torch.int64, device=weight.device)
            for labels, axis in ((rows, 0), (cols, 1)):
                if labels is not None:
                    times = times + _along(_pruned(plan, labels, mask).long(), weight, axis)
            weight.copy_((weight.to(dtype) * factors[times]).to(weight.dtype))


def lasso_grad_(
    plan: Plan,
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    mask: Tensor,
    strength: Tensor,
) -> None:
    """Eq. 8; see `ocsfast.ops.lasso_grad_`."""
    with torch.no_grad():
        norm = _slice_squares(plan, weights, torch.float64).sqrt()
        counts = mask[plan.table("slice_group").long()] & (norm != 0)
        # A last entry that label -1 reads.
        factor = torch.cat([torch.where(counts, strength.double() / norm, 0.0), norm.new_zeros(1)])
        for grad, (weight, rows, cols) in zip(grads, _slices(plan, weights), strict=True):
            if grad is None:
                continue
            dtype = _accumulator(weight.dtype)
            total = torch.zeros((), dtype=dtype, device=weight.device)
            for labels, axis in ((rows, 0), (cols, 1)):
                if labels is not None:
                    total = total + _along(factor[labels].to(dtype), weight, axis)
            grad.copy_(
                torch.where(total != 0, grad.to(dtype) + weight.to(dtype) * total, grad.to(dtype))
            )


def jaccard(plan: Plan, mask_a: Tensor, mask_b: Tensor) -> Tensor:
    """Eq. 3; see `ocsfast.ops.jaccard`."""
    sizes = plan.table("family_start").diff().tolist()
    layers = plan.table("family_layers").double()
    alike = []
    for a, b in zip(torch.split(mask_a, sizes), torch.split(mask_b, sizes), strict=True):
        both, either = (~a & ~b).sum().double(), (~a | ~b).sum().double()
        alike.append(both / either if either > 0 else torch.ones_like(both))
    if not bool(layers.sum() > 0):
        return torch.ones((), dtype=torch.float64, device=mask_a.device)
    return (torch.stack(alike) * layers).sum() / layers.sum()


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _slices(
    plan: Plan, weights: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Each weight with the slices of its rows and of its columns: int64, -1 where there is none."""
    row_slice, col_slice = plan.table("row_slice").long(), plan.table("col_slice").long()
    for weight, (rows, cols, _, _, row_base, col_base) in zip(
        weights, plan.shapes.tolist(), strict=True
    ):
        yield (
            weight,
            None if row_base < 0 else row_slice[row_base : row_base + rows],
            None if col_base < 0 else col_slice[col_base : col_base + cols],
        )


def _slice_squares(plan: Plan, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Sum of squares of each slice: [slices]."""
    total = torch.zeros(plan.count("slices") + 1, dtype=dtype, device=plan.tables.device)
    for weight, rows, cols in _slices(plan, weights):
        square = weight.detach().to(dtype).square()
        for labels, axis in ((rows, 0), (cols, 1)):
            if labels is not None:
                others = [d for d in range(weight.dim()) if d != axis]
                sums = square.sum(others) if others else square
                total.index_add_(0, labels.where(labels >= 0, total.numel() - 1), sums)
    return total[:-1]


def _pruned(plan: Plan, labels: Tensor, mask: Tensor) -> Tensor:
    """Whether each index along an axis lies in a slice of a pruned group: bool."""
    of_slice = torch.cat([mask[plan.table("slice_group").long()], mask.new_zeros(1)])
    return of_slice[labels]


def _along(values: Tensor, weight: Tensor, axis: int) -> Tensor:
    """One value an index of `axis`, shaped to broadcast over the weight."""
    return values.view([-1 if d == axis else 1 for d in range(weight.dim())])
