"""Plain-torch walks of a plan's tables: for whatever no kernel does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ocsfast.core.criteria import CRITERIA
from ocsfast.ops.plan import Plan


def matrices(
    plan: Plan, tensors: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Each tensor as [rows, cols, inner], with the slices of its rows and of its columns.

    Slices are int64, -1 where there is none. A weight that the plan describes is not copied.
    """
    row_slice, col_slice = plan.table("row_slice").long(), plan.table("col_slice").long()
    for tensor, (rows, cols, inner, _, row_base, col_base) in zip(
        tensors, plan.shapes.tolist(), strict=True
    ):
        of_rows = None if row_base < 0 else row_slice[row_base : row_base + rows]
        of_cols = None if col_base < 0 else col_slice[col_base : col_base + cols]
        yield tensor.reshape(rows, cols, inner), of_rows, of_cols


def slice_sums(
    plan: Plan, elements: Sequence[Tensor], dtype: torch.dtype, reduce: str = "sum"
) -> Tensor:
    """Sum (or "amax") over each slice of a tensor of elements for each weight: [slices]."""
    total = torch.zeros(plan.count("slices") + 1, dtype=dtype, device=plan.tables.device)
    for element, rows, cols in matrices(plan, elements):
        for labels, axis in ((rows, 0), (cols, 1)):
            if labels is not None and element.numel():
                joined = getattr(torch, reduce)(element.to(dtype), (1 - axis, 2))
                index = labels.where(labels >= 0, total.numel() - 1)
                total.scatter_reduce_(0, index, joined, reduce)
    return total[:-1]


def lasso_slopes(plan: Plan, squares: Tensor, mask: Tensor, lam: Tensor) -> Tensor:
    """[slices + 1] for Eq. 8, from sums of squares: lam / |slice| where that is pruned and not 0.

    Else 0, and so in the last entry, which label -1 reads.
    """
    norms = squares.sqrt()
    counts = mask[plan.table("slice_group").long()] & (norms != 0)
    return torch.cat([torch.where(counts, lam / norms, 0.0), norms.new_zeros(1)])


def group_means(plan: Plan, values: Tensor) -> Tensor:
    """[groups] from [slices]: the mean over each group's slices, 0 where it has none.

    Not by index_add: on CUDA that adds up in any order, and ranks of a run would not agree.
    """
    counts = plan.table("group_start").diff().long()
    in_groups = values[plan.table("group_slice").long()]
    sums = torch.segment_reduce(in_groups, "sum", lengths=counts, unsafe=True)
    return sums / counts.clamp(min=1)


def group_scores(plan: Plan, sums: Tensor, criterion: str) -> Tensor:
    """[groups] by one of CRITERIA, from its sums over the slices: [slices]."""
    size = plan.table("slice_size").clamp(min=1).to(sums.dtype)
    return group_means(plan, CRITERIA[criterion].slice(sums, size))
