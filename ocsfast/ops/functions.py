"""The compiled ops on a plan: saliency, partition, comparison, penalty, and optimizer steps.

Plain-torch twins with the same signatures are in `ocsfast.ops.reference`. All of these run without
autograd. The in-place ones raise the version of what they change, so that a backward pass that still
needs an old value fails loudly, as after any in-place op of torch.

`group_saliency`, `slice_sums`, `lasso_grad_` and `shrink_` dispatch on how the weights lie: here for
`Bound`, in `ocsfast.distributed.fsdp` for weights whose rows several processes hold.

Where an op takes a 0-dim tensor "on the CPU or on the weights' device", one on the CPU goes to a GPU's
kernel by value: it costs no copy and no launch, and a CUDA graph repeats the value of its capture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import cast

import torch
from torch import Tensor

from ocsfast.ops import fakes, tables  # noqa: F401  fakes registers what ops return of fake tensors
from ocsfast.ops.bound import Bound, Weights
from ocsfast.ops.cost import CostModel
from ocsfast.ops.extension import op
from ocsfast.ops.plan import Plan

_GROUP_SALIENCY = op("group_saliency")
_PARTITION = op("partition")
_SHRINK = op("shrink_")
_LASSO_GRAD = op("lasso_grad_")
_SGD_STEP = op("sgd_step_")
_ADAMW_STEP = op("adamw_step_")
_COMPARE = op("compare")


@singledispatch
def group_saliency(
    bound: Weights, criterion: str = "l2", others: Sequence[Tensor | None] = ()
) -> tuple[Tensor, Tensor]:
    """Score every group: by default Eq. 2, the mean over its slices of |w|_2 / sqrt(elements of w).

    All weights are read once, or not at all where their squares are all it takes and an op has left them
    behind. NaN and infinite weights reach the scores of their groups.

    Args:
        bound: plan and weights.
        criterion: one of `ocsfast.core.criteria.CRITERIA`, which holds the formula of each: what a
            group's mean over its slices is taken of.
        others: for the criteria with an x, a tensor for each weight, of its shape, strides, dtype and
            device; slices of a weight with None count as 0.

    Returns:
        scores [groups] and for each slice the sum (or maximum) it was scored by, [slices]: float32, or
        float64 where any weight is. The same to the bit at every call and with any number of threads.

    Raises:
        RuntimeError: an argument does not fit the plan.
    """
    assert isinstance(bound, Bound)  # other weights register an implementation of their own
    wide = any(weight.dtype == torch.float64 for weight in bound.weights)
    tables, dtype = bound.plan.tables, torch.float64 if wide else torch.float32
    scores = tables.new_empty(bound.plan.count("groups"), dtype=dtype)
    slices = tables.new_empty(bound.plan.count("slices"), dtype=dtype)
    beside = bound.aligned(others) if others else []
    _GROUP_SALIENCY(bound.ticket, scores, slices, beside, criterion, bound.knows())
    if criterion in ("l2", "l2_squared"):
        bound.learn()
    return scores, slices


@singledispatch
def slice_sums(bound: Weights, elements: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Add up, over each slice, a tensor of elements for each weight; no kernel, plain torch.

    Args:
        bound: plan and weights.
        elements: one tensor for each weight, of its shape.
        dtype: of the sums.

    Returns:
        [slices].
    """
    return tables.slice_sums(bound.plan, elements, dtype)


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
    """Choose the groups to prune so that the cost is at most `budget`, and no more than that takes.

    Groups are in one order: by score (-0.0 equals 0.0), then by index. For a threshold in it, each
    family loses its lowest groups up to the threshold, `limits` of them at most, and then fewer until it
    keeps a multiple of its unit (or loses none). The lowest threshold whose cost is within the budget
    decides, and then gives back what that took beyond the budget, the highest scores first:

    1. The family of the group at the threshold is held: it loses so many groups from now on.
    2. The lowest threshold within the budget is found again, for the families that are not held.
    3. Both are repeated until every family that loses something is held.

    So no family can lose one unit less within the budget: the next multiple, or none. Scores of at least
    0 that shrink, all chosen ones by one factor, leave the choice as it is.
    Exact; on CUDA one launch without synchronisation.

    Args:
        plan: the tables.
        cost_model: the cost of kept counts, on the device of the plan. It may not fall where more stays.
        scores: [groups] float32 or float64.
        limits: [families] int64, the most groups each family may lose; values beyond 0 .. its size
            stand for the nearest of the two.
        budget: 0-dim int64, the highest allowed cost.
        units: [families] int64, what each family's kept count is a multiple of; values beyond 1 .. its
            size stand for the nearest of the two. None: 1.
        ties: [families] int64, the first family that each is tied to, or itself; None: all are free.
            Tied families are of one size, limit and unit. Each loses as many as the one with most groups
            up to the threshold, and they are held together.
        give_back: whether to give back; False: the lowest threshold within the budget decides alone.

    Returns:
        mask [groups] bool, true where a group goes; its cost, 0-dim int64; status, 0-dim int32:
        bit 0: the budget cannot be reached, and the mask is all that the limits allow;
        bit 1: a score is NaN, and the mask is empty.

    Raises:
        RuntimeError: an argument does not fit the plan.
    """
    mask, cost, status = _PARTITION(
        scores.detach(),
        plan.tables,
        plan.layout,
        cost_model.tables,
        cost_model.layout,
        limits,
        budget,
        units,
        ties,
        give_back,
    )
    return mask, cost, status


@singledispatch
def shrink_(bound: Weights, mask: Tensor, factor: Tensor) -> None:
    """Eq. 9, in place: multiply each element by factor ** (number of pruned slices that contain it).

    Args:
        bound: plan and weights, which may require grad.
        mask: [groups] bool, the groups to prune.
        factor: 0-dim float32 on the CPU or on the weights' device, 1 - lam * learning rate.

    Raises:
        RuntimeError: an argument does not fit the plan. Nothing has been changed then.
    """
    assert isinstance(bound, Bound)  # other weights register an implementation of their own
    _SHRINK(bound.ticket, mask, factor)
    bound.changed()
    bound.learn(mask)


@singledispatch
def lasso_grad_(bound: Weights, grads: Sequence[Tensor | None], mask: Tensor, lam: Tensor) -> None:
    """Eq. 8 by its gradient: grad += lam * w / |slice|_2, for each pruned slice that contains w.

    The norms are those of the weights as they are now; a slice of norm 0 adds nothing. Where `shrink_`
    or another op has left them behind, the weights are read once; else twice.

    Args:
        bound: plan and weights.
        grads: one for each weight, of its shape, dtype and device, or None: that weight is left out.
            A gradient with other strides than its weight costs two copies of it.
        mask: [groups] bool, the groups to prune.
        lam: 0-dim float32 on the CPU or on the weights' device.

    Raises:
        ValueError: there are more or fewer gradients than weights.
        RuntimeError: an argument does not fit the plan. Nothing has been changed then.
    """
    assert isinstance(bound, Bound)  # other weights register an implementation of their own
    known = bound.knows(mask)
    with torch.no_grad():
        taken = _with_gradients(
            bound, grads, lambda own: _LASSO_GRAD(bound.ticket, own, mask, lam, known)
        )
        for grad, copy in zip(grads, taken, strict=True) if taken else ():
            if grad is not None and copy is not grad:
                grad.copy_(copy)
    if not known:
        bound.learn()
    torch.autograd.graph.increment_version([grad for grad in grads if grad is not None])


def _with_gradients(
    bound: Bound, grads: Sequence[Tensor | None], call: Callable[[list[Tensor]], None]
) -> list[Tensor]:
    """Call an op on gradients; where they lie otherwise than their weights, on copies that do not.

    As a rule they have them already. The op looks at them in any case, so it is asked first.

    Returns:
        What the op was called with, if that took copies.
    """
    try:
        call(bound.states(grads))
        return []
    except RuntimeError:  # nothing has been changed
        if bound.fits(grads):
            raise
    copies = bound.aligned(grads)
    call(copies)
    return copies


@dataclass(frozen=True, eq=False)
class Penalty:
    """Eq. 8 and Eq. 9 for an optimizer's step."""

    mask: Tensor  # [groups] bool, the groups to prune
    lam: Tensor  # 0-dim float32: as for `lasso_grad_`
    factor: Tensor  # 0-dim float32: as for `shrink_`


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
    """A step of SGD as `torch.optim.SGD` takes it, in one pass over weights, gradients and momenta.

    With a penalty the same pass adds Eq. 8 to the gradient (not to `grads` themselves), shrinks the new
    weights by Eq. 9, and takes the slices' sums of squares for whatever comes next. Weights without a
    gradient take no step, but are shrunk.

    Args:
        bound: plan and weights.
        grads: as for `lasso_grad_`.
        momenta: one for each weight with a gradient, of its shape, dtype, strides and device; None for
            all where momentum is 0. Changed in place.
        lr: 0-dim float64 on the CPU or on the weights' device.
        first: positions of the weights whose momentum begins here: with the gradient, undampened.
        momentum, dampening, weight_decay, nesterov, maximize: as for `torch.optim.SGD`.
        grad_scale: 0-dim float32, what gradients are divided by; `grads` themselves stay scaled.
        found_inf: 0-dim float32; where it is not 0, nothing is stepped and nothing shrunk.

    Raises:
        ValueError: there are more or fewer gradients than weights.
        RuntimeError: an argument does not fit the plan. Nothing has been changed then.
    """
    buffers, rest = bound.states(momenta), (*_penalize(bound, penalty, found_inf), grad_scale, found_inf)
    settings = (momentum, dampening, weight_decay, nesterov, maximize)
    with torch.no_grad():
        _with_gradients(
            bound, grads, lambda own: _SGD_STEP(bound.ticket, own, buffers, first, lr, *settings, *rest)
        )
    _stepped(bound, grads, momenta, penalty)


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
    """A step of AdamW as `torch.optim.AdamW` takes it, in one pass over weights, gradients and averages.

    With a penalty the same pass does what it does in `sgd_step_`; Eq. 8 is part of the gradient that is
    averaged. In half precision weights move by the averages as they are before they are rounded, as
    torch's fused AdamW does it.

    Args:
        bound: plan and weights.
        grads: as for `lasso_grad_`.
        exp_avgs, exp_avg_sqs: one for each weight with a gradient, of its shape, dtype, strides and
            device. Changed in place.
        steps: of each weight with a gradient, how many it has taken: 0-dim float32 on its device, to
            which this step is added in place.
        lr: 0-dim float64 on the CPU or on the weights' device.
        betas, eps, weight_decay, maximize: as for `torch.optim.AdamW`.
        grad_scale, found_inf: as for `sgd_step_`; a step that is not taken is not counted.

    Raises:
        ValueError: there are more or fewer gradients than weights.
        RuntimeError: an argument does not fit the plan. Nothing has been changed then.
    """
    states = [bound.states(tensors) for tensors in (exp_avgs, exp_avg_sqs, steps)]
    settings = (*betas, eps, weight_decay, maximize)
    rest = (*_penalize(bound, penalty, found_inf), grad_scale, found_inf)
    with torch.no_grad():
        _with_gradients(
            bound, grads, lambda own: _ADAMW_STEP(bound.ticket, own, *states, lr, *settings, *rest)
        )
    _stepped(bound, grads, [*exp_avgs, *exp_avg_sqs, *steps], penalty)


def _penalize(
    bound: Bound, penalty: Penalty | None, found_inf: Tensor | None
) -> tuple[Tensor | bool | None, ...]:
    """The last arguments of an op that takes a step: mask, lam, factor, known."""
    if penalty is None:
        return None, None, None, False
    # A step that is skipped leaves what was known: it has to be all that a step taken would leave.
    known = bound.knows(penalty.mask if found_inf is None else None)
    return penalty.mask, penalty.lam, penalty.factor, known


def _stepped(
    bound: Bound,
    grads: Sequence[Tensor | None],
    states: Sequence[Tensor | None],
    penalty: Penalty | None,
) -> None:
    """Say what a step has changed."""
    torch.autograd.graph.increment_version([s for s in states if s is not None])
    if penalty is not None:
        bound.changed()
        bound.learn()
    else:
        stepped = [w for w, grad in zip(bound.weights, grads, strict=True) if grad is not None]
        torch.autograd.graph.increment_version(stepped)
        bound.forget()


def compare(
    plan: Plan,
    mask: Tensor,
    sizes: Tensor,
    cost: Tensor,
    status: Tensor,
    first: Tensor | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """What a partition comes to, beside earlier ones: all that a check reads, so that it reads once.

    Eq. 3 says how alike what two partitions keep is, from 0 to 1: the mean over layers of
    |kept by both| / |kept by either| (1 where neither keeps any), where layers that share a family's
    channels count once each.

    Args:
        plan: the tables.
        mask: [groups] bool, the groups to prune.
        sizes: [groups] float32 or float64, to be added up.
        cost, status: those of `partition`, which gave the mask.
        first: the mask that Eq. 3 compares with; None: the same one, whose index is 1.
        last: the mask since which changes are counted; None: the same one, with no change.

    Returns:
        [7 + families] float64: `ocsfast.ops.plan.FACTS`, and how many groups each family keeps. Costs
        are exact below 2 ** 53. Sums are the same to the bit at every call.

    Raises:
        RuntimeError: an argument does not fit the plan.
    """
    return cast(
        Tensor, _COMPARE(mask, sizes.detach(), cost, status, first, last, plan.tables, plan.layout)
    )
