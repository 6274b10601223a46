"""The compiled ops on a plan: saliency, partition, penalty, similarity.

Plain-torch twins with the same signatures are in `ocsfast.reference`. All of these run without autograd;
the in-place ones raise the version of what they change, so that a backward pass that still needs an old
value fails loudly, as after any in-place op of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ocsfast.cost import CostModel
from ocsfast.plan import COUNTS, Plan

try:
    from ocsfast import _C
except ImportError as error:
    raise ImportError(
        f"The compiled part of ocsfast is missing or does not fit torch {torch.__version__} ({error}): "
        "run `pip install .` in ocsfast's source folder with this torch installed."
    ) from error

build_info = _C.build_info


def group_saliency(
    plan: Plan, weights: Sequence[Tensor], *, squared: bool = False
) -> tuple[Tensor, Tensor]:
    """Score every group by Eq. 2: the mean over its slices of |w|_2 / sqrt(elements of w).

    All weights are read once. NaN and infinite weights reach the scores of their groups.

    Args:
        plan: the tables, on the device of the weights.
        weights: `plan.names` in order, of the shapes and strides the plan was built for; float32,
            bfloat16, float16 and float64 may be mixed.
        squared: score by sum(w**2) / sqrt(elements), as the authors' released code does.

    Returns:
        scores [groups] and the slices' sums of squares [slices]: float32, or float64 where any weight
        is. The same to the bit at every call and with any number of threads.

    Raises:
        RuntimeError: a weight is not what the plan was built for.
    """
    scores, slice_sq = torch.ops.ocsfast.group_saliency(
        _detached(weights), plan.tables, plan.shapes, plan.layout, squared
    )
    return scores, slice_sq


def partition(
    plan: Plan,
    cost_model: CostModel,
    scores: Tensor,
    limits: Tensor,
    budget: Tensor,
    round_to: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the groups to prune so that the cost is at most `budget`, and no more than that takes.

    Groups are in one order: by score (-0.0 equals 0.0), then by index. For a threshold in it, each
    family loses its lowest groups up to the threshold, `limits` of them at most, and then fewer until it
    keeps a multiple of `round_to` (or loses none). The lowest threshold whose cost is within the budget
    decides.
    Exact; on CUDA one launch without synchronisation.

    Args:
        plan: the tables.
        cost_model: the cost of kept counts, on the device of the plan.
        scores: [groups] float32 or float64.
        limits: [families] int64, the most groups each family may lose; values beyond 0 .. its size
            stand for the nearest of the two.
        budget: 0-dim int64, the highest allowed cost.
        round_to: kept counts are multiples of this.

    Returns:
        mask [groups] bool, true where a group goes; its cost, 0-dim int64; status, 0-dim int32:
        bit 0: the budget cannot be reached, and the mask is all that the limits allow;
        bit 1: a score is NaN, and the mask is empty.

    Raises:
        RuntimeError: an argument does not fit the plan.
    """
    mask, cost, status = torch.ops.ocsfast.partition(
        scores.detach(),
        plan.tables,
        plan.layout,
        cost_model.tables,
        cost_model.layout,
        limits,
        round_to,
        budget,
    )
    return mask, cost, status


def shrink_(plan: Plan, weights: Sequence[Tensor], mask: Tensor, factor: Tensor) -> None:
    """Eq. 9, in place: multiply each element by factor ** (number of pruned slices that contain it).

    Args:
        plan: the tables.
        weights: as for `group_saliency`; may require grad.
        mask: [groups] bool, the groups to prune.
        factor: 0-dim float32 on the weights' device, 1 - strength * learning rate.

    Raises:
        RuntimeError: an argument does not fit the plan. Nothing has been changed then.
    """
    with torch.no_grad():
        torch.ops.ocsfast.shrink_(
            _detached(weights), plan.tables, plan.shapes, plan.layout, mask, factor
        )
    _changed(weights)


def lasso_grad_(
    plan: Plan,
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    mask: Tensor,
    strength: Tensor,
) -> None:
    """Eq. 8 by its gradient: grad += strength * w / |slice|_2, for each pruned slice that contains w.

    The norms are those of the weights as they are now; a slice of norm 0 adds nothing.

    Args:
        plan: the tables.
        grads: one for each weight, of its shape, dtype and device, or None: that weight is left out.
            A gradient with other strides than its weight costs two copies of it.
        weights: as for `group_saliency`.
        mask: [groups] bool, the groups to prune.
        strength: 0-dim float32 on the weights' device.

    Raises:
        ValueError: there are more or fewer gradients than weights.
        RuntimeError: an argument does not fit the plan. Nothing has been changed then.
    """
    if len(grads) != len(weights):
        raise ValueError(f"ocsfast.lasso_grad_: {len(grads)} gradients for {len(weights)} weights")
    with torch.no_grad():
        matched = [
            w.new_empty(0) if g is None else _as_strided_like(g.detach(), w)
            for g, w in zip(grads, weights, strict=True)
        ]
        torch.ops.ocsfast.lasso_grad_(
            matched, _detached(weights), plan.tables, plan.shapes, plan.layout, mask, strength
        )
        for g, m in zip(grads, matched, strict=True):
            if g is not None and m.data_ptr() != g.data_ptr():
                g.copy_(m)
    _changed([g for g in grads if g is not None])


def jaccard(plan: Plan, mask_a: Tensor, mask_b: Tensor) -> Tensor:
    """Eq. 3: how alike what two partitions keep is, from 0 to 1.

    Args:
        plan: the tables.
        mask_a: [groups] bool, the groups to prune in one partition.
        mask_b: the same for the other.

    Returns:
        0-dim float64: the mean over layers of |kept by both| / |kept by either| (1 where neither keeps
        any), where layers that share a family's channels count once each.

    Raises:
        RuntimeError: a mask does not fit the plan.
    """
    return cast(Tensor, torch.ops.ocsfast.jaccard(mask_a, mask_b, plan.tables, plan.layout))


def _detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    # The ops have no autograd kernel: a weight that requires grad would only draw a warning.
    return [tensor.detach() for tensor in tensors]


def _changed(tensors: Sequence[Tensor]) -> None:
    torch.autograd.graph.increment_version(tensors)


def _as_strided_like(grad: Tensor, weight: Tensor) -> Tensor:
    """`grad`, or a copy of it with the strides of `weight`; the op refuses what does not fit."""
    if grad.stride() == weight.stride() or grad.shape != weight.shape or grad.dtype != weight.dtype:
        return grad
    return torch.empty_strided(
        weight.shape, weight.stride(), dtype=grad.dtype, device=grad.device
    ).copy_(grad)


def _layout_count(layout: Sequence[int], name: str) -> int:
    return layout[COUNTS.index(name)]


def _fake_group_saliency(
    weights: list[Tensor], tables: Tensor, shapes: Tensor, layout: Sequence[int], squared: bool
) -> tuple[Tensor, Tensor]:
    wide = any(weight.dtype == torch.float64 for weight in weights)
    dtype = torch.float64 if wide else torch.float32
    return (
        tables.new_empty(_layout_count(layout, "groups"), dtype=dtype),
        tables.new_empty(_layout_count(layout, "slices"), dtype=dtype),
    )


def _fake_partition(
    scores: Tensor,
    tables: Tensor,
    layout: Sequence[int],
    cost_tables: Tensor,
    cost_layout: Sequence[int],
    limits: Tensor,
    round_to: int,
    budget: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        tables.new_empty(_layout_count(layout, "groups"), dtype=torch.bool),
        tables.new_empty((), dtype=torch.int64),
        tables.new_empty((), dtype=torch.int32),
    )


def _fake_shrink(
    weights: list[Tensor],
    tables: Tensor,
    shapes: Tensor,
    layout: Sequence[int],
    mask: Tensor,
    factor: Tensor,
) -> None:
    return None


def _fake_lasso_grad(
    grads: list[Tensor],
    weights: list[Tensor],
    tables: Tensor,
    shapes: Tensor,
    layout: Sequence[int],
    mask: Tensor,
    strength: Tensor,
) -> None:
    return None


def _fake_jaccard(mask_a: Tensor, mask_b: Tensor, tables: Tensor, layout: Sequence[int]) -> Tensor:
    return tables.new_empty((), dtype=torch.float64)


for _name, _fake in (
    ("group_saliency", _fake_group_saliency),
    ("partition", _fake_partition),
    ("shrink_", _fake_shrink),
    ("lasso_grad_", _fake_lasso_grad),
    ("jaccard", _fake_jaccard),
):
    torch.library.register_fake(f"ocsfast::{_name}", _fake)
