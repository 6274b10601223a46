"""The compiled ops on a plan: saliency, partition, penalty, similarity.

Plain-torch twins with the same signatures are in `ocsfast.reference`. All of these run without autograd;
the in-place ones raise the version of what they change, so that a backward pass that still needs an old
value fails loudly, as after any in-place op of torch.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from ocsfast.ops.capture import is_capturing
from ocsfast.ops.cost import CostModel
from ocsfast.ops.plan import COUNTS, Plan
from ocsfast.ops.tables import slice_sums

try:
    from ocsfast.ops import _C
except ImportError as error:
    raise ImportError(
        f"The compiled part of ocsfast is missing or does not fit torch {torch.__version__} ({error}): "
        "run `pip install .` in ocsfast's source folder with this torch installed."
    ) from error

build_info = _C.build_info
_VERSION = operator.attrgetter("_version")

# The overloads themselves: looking them up costs as much as a call.
_GROUP_SALIENCY = torch.ops.ocsfast.group_saliency.default
_SHRINK = torch.ops.ocsfast.shrink_.default
_LASSO_GRAD = torch.ops.ocsfast.lasso_grad_.default
_SGD_STEP = torch.ops.ocsfast.sgd_step_.default
_ADAMW_STEP = torch.ops.ocsfast.adamw_step_.default


class Weights(Protocol):
    """A plan's weights, and what a pruner does with them; `Bound` where one process holds them whole."""

    @property
    def plan(self) -> Plan: ...

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """`plan.names` in order: the model's own parameters."""

    def pointers(self) -> tuple[int, ...]:
        """Where the weights lie in memory."""

    def forget(self) -> None:
        """Take what was learned of the weights anew when next it is needed."""

    def not_finite(self) -> str | None:
        """The first weight that holds NaN or infinite values."""

    def saliency(
        self, criterion: str = "l2", others: Sequence[Tensor | None] = ()
    ) -> tuple[Tensor, Tensor]:
        """As `group_saliency`."""

    def slice_sums(self, elements: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The sum over each slice of a tensor of elements beside each weight: [slices]."""

    def add_lasso(self, grads: Sequence[Tensor | None], mask: Tensor, strength: Tensor) -> None:
        """As `lasso_grad_`."""

    def shrink(self, mask: Tensor, factor: Tensor) -> None:
        """As `shrink_`."""


class Bound:
    """A plan bound to the weights it walks: checked once, with what kernels remember between calls.

    A call then costs microseconds on the host however many weights there are. The weights are held, and
    may change in value but not in place, shape, strides, dtype or device: an op that finds them changed
    raises. Ops leave the slices' sums of squares behind, and use those of the op before them as long as
    the weights are as that op left them, which their versions tell: changes through `.data`, that torch
    does not see, are not seen here either, but by `forget()`. On CUDA, its ops belong on one stream at a
    time: they share scratch memory. That memory outlives what was started on any stream, and what a CUDA
    graph was captured with is kept for good. Once an op was captured, sums of squares are taken anew.

    Attributes:
        plan: the tables, on the device of the weights.
        weights: `plan.names` in order, of the shapes and strides the plan was built for; float32,
            bfloat16, float16 and float64 may be mixed.
        strides: of the weights, as they were bound.

    Raises:
        RuntimeError: a weight is not what the plan was built for, or the plan contradicts itself.
    """

    def __init__(self, plan: Plan, weights: Sequence[Tensor]) -> None:
        self.plan = plan
        self.weights = tuple(weights)
        with torch.no_grad():  # or the op would be given aliases, and not see a weight change its memory
            self.ticket = torch.ops.ocsfast.bind(self.weights, plan.tables, plan.shapes, plan.layout)
        weakref.finalize(self, _C.release, int(self.ticket))
        self._known: tuple[int, Tensor | None, int] | None = None
        self._captured = False  # replays change weights, and nobody raises their versions
        self.strides = [weight.stride() for weight in self.weights]
        self._none = plan.tables.new_empty(0)

    def forget(self) -> None:
        """Take the sums of squares anew when next they are needed."""
        self._known = None

    def knows(self, mask: Tensor | None = None) -> bool:
        """Whether the sums of squares are at hand: of all slices, or of those of `mask`'s groups."""
        if self._captured or self._known is None or self._known[0] != self._version():
            return False
        if is_capturing(self.plan.tables.device):
            return False  # what is known now may not be so at a replay
        _, of, version = self._known
        return of is None or (of is mask and of._version == version)

    def _version(self) -> int:
        return sum(map(_VERSION, self.weights))

    def _changed(self) -> None:
        torch.autograd.graph.increment_version(self.weights)

    def _learn(self, mask: Tensor | None = None) -> None:
        self._captured = self._captured or is_capturing(self.plan.tables.device)
        self._known = (self._version(), mask, 0 if mask is None else mask._version)

    # As `Weights` says.

    def pointers(self) -> tuple[int, ...]:
        return tuple(weight.data_ptr() for weight in self.weights)

    def not_finite(self) -> str | None:
        flags = zip(self.plan.names, self.weights, strict=True)
        return next((name for name, weight in flags if not bool(weight.isfinite().all())), None)

    def saliency(
        self, criterion: str = "l2", others: Sequence[Tensor | None] = ()
    ) -> tuple[Tensor, Tensor]:
        return group_saliency(self, criterion, others)

    def slice_sums(self, elements: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return slice_sums(self.plan, elements, dtype)

    def add_lasso(self, grads: Sequence[Tensor | None], mask: Tensor, strength: Tensor) -> None:
        lasso_grad_(self, grads, mask, strength)

    def shrink(self, mask: Tensor, factor: Tensor) -> None:
        shrink_(self, mask, factor)


def group_saliency(
    bound: Bound, criterion: str = "l2", others: Sequence[Tensor | None] = ()
) -> tuple[Tensor, Tensor]:
    """Score every group: by default Eq. 2, the mean over its slices of |w|_2 / sqrt(elements of w).

    All weights are read once, or not at all where their squares are all it takes and an op has left them
    behind. NaN and infinite weights reach the scores of their groups.

    Args:
        bound: plan and weights.
        criterion: what the mean over the slices is taken of. With n elements w in a slice, and x those
            in their place of `others`:
            "l2": |w|_2 / sqrt(n), Eq. 2; "l2_squared": sum w**2 / sqrt(n), as the authors' released code
            does; "l1": sum |w| / n; "linf": max |w|;
            "taylor", "taylor_state": |sum w x|, first-order Taylor, x a gradient or its moving average;
            "obd": sum w**2 x**2 / 2, x a gradient; "obd_state": sum w**2 x / 2, x its average square.
        others: for the last four, a tensor beside each weight, of its shape, strides, dtype and device;
            slices of a weight with None count as 0.

    Returns:
        scores [groups] and for each slice the sum (or maximum) it was scored by, [slices]: float32, or
        float64 where any weight is. The same to the bit at every call and with any number of threads.

    Raises:
        RuntimeError: an argument does not fit the plan.
    """
    wide = any(weight.dtype == torch.float64 for weight in bound.weights)
    tables, dtype = bound.plan.tables, torch.float64 if wide else torch.float32
    scores = tables.new_empty(bound.plan.count("groups"), dtype=dtype)
    slices = tables.new_empty(bound.plan.count("slices"), dtype=dtype)
    beside = _beside(bound, others) if others else []
    _GROUP_SALIENCY(bound.ticket, scores, slices, beside, criterion, bound.knows())
    if criterion in ("l2", "l2_squared"):
        bound._learn()
    return scores, slices


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


def shrink_(bound: Bound, mask: Tensor, factor: Tensor) -> None:
    """Eq. 9, in place: multiply each element by factor ** (number of pruned slices that contain it).

    Args:
        bound: plan and weights, which may require grad.
        mask: [groups] bool, the groups to prune.
        factor: 0-dim float32 on the weights' device, 1 - strength * learning rate.

    Raises:
        RuntimeError: an argument does not fit the plan. Nothing has been changed then.
    """
    _SHRINK(bound.ticket, mask, factor)
    bound._changed()
    bound._learn(mask)


def lasso_grad_(bound: Bound, grads: Sequence[Tensor | None], mask: Tensor, strength: Tensor) -> None:
    """Eq. 8 by its gradient: grad += strength * w / |slice|_2, for each pruned slice that contains w.

    The norms are those of the weights as they are now; a slice of norm 0 adds nothing. Where `shrink_`
    or another op has left them behind, the weights are read once; else twice.

    Args:
        bound: plan and weights.
        grads: one for each weight, of its shape, dtype and device, or None: that weight is left out.
            A gradient with other strides than its weight costs two copies of it.
        mask: [groups] bool, the groups to prune.
        strength: 0-dim float32 on the weights' device.

    Raises:
        ValueError: there are more or fewer gradients than weights.
        RuntimeError: an argument does not fit the plan. Nothing has been changed then.
    """
    known = bound.knows(mask)
    with torch.no_grad():
        matched = _beside(bound, grads)
        _LASSO_GRAD(bound.ticket, matched, mask, strength, known)
        for grad, copy in zip(grads, matched, strict=True):
            if grad is not None and copy is not grad:
                grad.copy_(copy)
    if not known:
        bound._learn()
    torch.autograd.graph.increment_version([grad for grad in grads if grad is not None])


@dataclass(frozen=True, eq=False)
class Penalty:
    """Eq. 8 and Eq. 9 for an optimizer's step."""

    mask: Tensor  # [groups] bool, the groups to prune
    strength: Tensor  # 0-dim float32: as for `lasso_grad_`
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
        lr: 0-dim float64 on the weights' device.
        first: positions of the weights whose momentum begins here: with the gradient, undampened.
        momentum, dampening, weight_decay, nesterov, maximize: as for `torch.optim.SGD`.
        grad_scale: 0-dim float32, what gradients are divided by; `grads` themselves stay scaled.
        found_inf: 0-dim float32; where it is not 0, nothing is stepped and nothing shrunk.

    Raises:
        ValueError: there are more or fewer gradients than weights.
        RuntimeError: an argument does not fit the plan. Nothing has been changed then.
    """
    with torch.no_grad():
        _SGD_STEP(
            bound.ticket,
            _beside(bound, grads),
            _states(bound, momenta),
            first,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize,
            *_penalize(bound, lr, penalty, found_inf),
            grad_scale,
            found_inf,
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
        lr: 0-dim float64 on the weights' device.
        betas, eps, weight_decay, maximize: as for `torch.optim.AdamW`.
        grad_scale, found_inf: as for `sgd_step_`; a step that is not taken is not counted.

    Raises:
        ValueError: there are more or fewer gradients than weights.
        RuntimeError: an argument does not fit the plan. Nothing has been changed then.
    """
    with torch.no_grad():
        _ADAMW_STEP(
            bound.ticket,
            _beside(bound, grads),
            _states(bound, exp_avgs),
            _states(bound, exp_avg_sqs),
            _states(bound, steps),
            lr,
            *betas,
            eps,
            weight_decay,
            maximize,
            *_penalize(bound, lr, penalty, found_inf),
            grad_scale,
            found_inf,
        )
    _stepped(bound, grads, [*exp_avgs, *exp_avg_sqs, *steps], penalty)


def _penalize(
    bound: Bound, lr: Tensor, penalty: Penalty | None, found_inf: Tensor | None
) -> tuple[Tensor | bool | None, ...]:
    """The last arguments of an op that takes a step: mask, strength, factor, known."""
    if penalty is None:
        unused = lr.new_ones((), dtype=torch.float32)
        return None, unused, unused, False
    # A step that is skipped leaves what was known: it has to be all that a step taken would leave.
    known = bound.knows(penalty.mask if found_inf is None else None)
    return penalty.mask, penalty.strength, penalty.factor, known


def _stepped(
    bound: Bound,
    grads: Sequence[Tensor | None],
    states: Sequence[Tensor | None],
    penalty: Penalty | None,
) -> None:
    """Say what a step has changed."""
    torch.autograd.graph.increment_version([s for s in states if s is not None])
    if penalty is not None:
        bound._changed()
        bound._learn()
    else:
        stepped = [w for w, grad in zip(bound.weights, grads, strict=True) if grad is not None]
        torch.autograd.graph.increment_version(stepped)
        bound.forget()


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


def _beside(bound: Bound, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """`tensors` with the strides of their weights, copied where need be, and an empty one for None."""
    if len(tensors) != len(bound.weights):
        raise ValueError(f"{len(tensors)} tensors for {len(bound.weights)} weights")
    return [
        bound._none if t is None else t if t.stride() == stride else _with_stride(t, stride)
        for t, stride in zip(tensors, bound.strides, strict=True)
    ]


def _states(bound: Bound, states: Sequence[Tensor | None]) -> list[Tensor]:
    """The same without copies: what is written to them has to stay."""
    if len(states) != len(bound.weights):
        raise ValueError(f"{len(states)} tensors for {len(bound.weights)} weights")
    return [bound._none if t is None else t for t in states]


def _with_stride(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    if tensor.dim() != len(stride):
        return tensor  # the op says what is wrong
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(
        tensor
    )


def _layout_count(layout: Sequence[int], name: str) -> int:
    return layout[COUNTS.index(name)]


def _fake_bind(weights: list[Tensor], tables: Tensor, shapes: Tensor, layout: Sequence[int]) -> Tensor:
    return shapes.new_empty((), dtype=torch.int64)


def _fake_nothing(*arguments: object) -> None:
    return None


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


def _fake_jaccard(mask_a: Tensor, mask_b: Tensor, tables: Tensor, layout: Sequence[int]) -> Tensor:
    return tables.new_empty((), dtype=torch.float64)


for _name, _fake in (
    ("bind", _fake_bind),
    ("group_saliency", _fake_nothing),
    ("partition", _fake_partition),
    ("shrink_", _fake_nothing),
    ("lasso_grad_", _fake_nothing),
    ("sgd_step_", _fake_nothing),
    ("adamw_step_", _fake_nothing),
    ("jaccard", _fake_jaccard),
):
    torch.library.register_fake(f"ocsfast::{_name}", _fake)
