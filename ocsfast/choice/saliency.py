"""What a group is worth: `Config.criterion` evaluated on a model's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ocsfast.core.criteria import CRITERIA, Criterion, Formula
from ocsfast.core.errors import StateError
from ocsfast.ops.bound import Weights
from ocsfast.ops.functions import group_saliency, slice_sums
from ocsfast.ops.tables import group_means


def saliency(
    bound: Weights, criterion: Criterion = "l2", optimizer: Optimizer | None = None
) -> tuple[Tensor, Tensor]:
    """The criterion's score of every group, and every group's Eq. 2.

    Args:
        bound: plan and weights.
        criterion: `Config.criterion`.
        optimizer: whose state the criterion may read; only "l2" and its like need none.

    Returns:
        Both [groups]; the same tensor where the criterion is Eq. 2.

    Raises:
        StateError: the criterion needs gradients or optimizer state, and there is none; or a function
            did not return one value for each element.
    """
    if criterion in ("l2", "l2_squared"):
        scores, _ = group_saliency(bound, str(criterion))
        return scores, scores
    sizes, _ = group_saliency(bound)
    if isinstance(criterion, str):
        others = _others(bound, criterion, CRITERIA[criterion], optimizer)
        return group_saliency(bound, criterion, others)[0], sizes
    elements = []
    for name, weight in zip(bound.plan.names, bound.weights, strict=True):
        with torch.no_grad():
            value = criterion(weight.detach(), weight.grad, _state(optimizer, weight))
        if not isinstance(value, Tensor) or value.shape != weight.shape:
            raise StateError(
                f"criterion={criterion!r} gave {getattr(value, 'shape', value)!r} for {name} of shape "
                f"{tuple(weight.shape)}: a tensor of that shape is expected"
            )
        elements.append(value)
    sums = slice_sums(bound, elements, sizes.dtype)
    return group_means(bound.plan, sums / bound.plan.table("slice_size").clamp(min=1)), sizes


def _others(
    bound: Weights, name: str, formula: Formula, optimizer: Optimizer | None
) -> Sequence[Tensor | None]:
    """The x of a formula, for each weight: its gradient, or what the optimizer keeps of it."""
    if not formula.x:
        return ()
    if formula.x == "gradient":
        found = [w.grad if w.grad is not None and not w.grad.is_sparse else None for w in bound.weights]
        if all(grad is None for grad in found):
            raise StateError(
                f"criterion={name!r} needs gradients, but at this check no weight has one: call "
                f"ocsfast.step before optimizer.zero_grad(), or use criterion='{name}_state', "
                "which takes the optimizer's moving average instead"
            )
        return found
    found = [_first(_state(optimizer, w), formula.keys) for w in bound.weights]
    if all(average is None for average in found):
        free = ", ".join(name for name, other in CRITERIA.items() if other.x != "state")
        raise StateError(
            f"criterion={name!r} needs {' or '.join(formula.keys)} in the optimizer's state, but "
            f"{type(optimizer).__name__} has none: train with {formula.keepers}, or use another "
            f"criterion ({free})"
        )
    return found


def _state(optimizer: Optimizer | None, weight: Tensor) -> Mapping[str, Any]:
    return {} if optimizer is None else optimizer.state.get(weight, {})


def _first(state: Mapping[str, Any], keys: Sequence[str]) -> Tensor | None:
    found = (state.get(key) for key in keys)
    return next((value for value in found if isinstance(value, Tensor)), None)
