"""What a group is worth: `Config.criterion` evaluated on a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ocsfast.core.errors import StateError
from ocsfast.ops.functions import Weights
from ocsfast.ops.tables import group_means

# Of a weight: itself, its gradient or None, its optimizer state (may be empty) -> what each of its
# elements is worth, of its shape.
CriterionFunction = Callable[[Tensor, Tensor | None, Mapping[str, Any]], Tensor]
Criterion = str | CriterionFunction

# From the weights alone; "l2" is Eq. 2. `ocsfast.ops.group_saliency` has the formulas.
OF_WEIGHTS = ("l2", "l2_squared", "l1", "linf")
# With the gradients that are there at the check.
OF_GRADIENTS = ("taylor", "obd")
# With what the optimizer keeps: the first of these it has.
OF_STATE = {"taylor_state": ("momentum_buffer", "exp_avg"), "obd_state": ("exp_avg_sq", "square_avg")}
KEEPING = {"taylor_state": "SGD with momentum, or Adam", "obd_state": "Adam or RMSprop"}  # who has these
NAMES = (*OF_WEIGHTS, *OF_GRADIENTS, *OF_STATE)


def saliency(bound: Weights, criterion: Criterion, optimizer: Optimizer) -> tuple[Tensor, Tensor]:
    """The criterion's score of every group, and every group's Eq. 2 (the same tensor where it is that).

    Raises:
        StateError: the criterion needs gradients or optimizer state, and there is none; or a function
            did not give a value an element.
    """
    if criterion in ("l2", "l2_squared"):
        scores, _ = bound.saliency(str(criterion))
        return scores, scores
    sizes, _ = bound.saliency()
    if isinstance(criterion, str):
        return bound.saliency(criterion, _others(bound, criterion, optimizer))[0], sizes
    elements = []
    for name, weight in zip(bound.plan.names, bound.weights, strict=True):
        with torch.no_grad():
            value = criterion(weight.detach(), weight.grad, optimizer.state.get(weight, {}))
        if not isinstance(value, Tensor) or value.shape != weight.shape:
            raise StateError(
                f"criterion={criterion!r} gave {getattr(value, 'shape', value)!r} for {name} of shape "
                f"{tuple(weight.shape)}: a tensor of that shape is expected"
            )
        elements.append(value)
    sums = bound.slice_sums(elements, sizes.dtype)
    return group_means(bound.plan, sums / bound.plan.table("slice_size").clamp(min=1)), sizes


def _others(bound: Weights, criterion: str, optimizer: Optimizer) -> Sequence[Tensor | None]:
    if criterion in OF_WEIGHTS:
        return ()
    if criterion in OF_GRADIENTS:
        found = [w.grad if w.grad is not None and not w.grad.is_sparse else None for w in bound.weights]
        if all(grad is None for grad in found):
            raise StateError(
                f"criterion={criterion!r} needs gradients, but at this check no weight has one: call "
                f"ocsfast.step before optimizer.zero_grad(), or use criterion='{criterion}_state', "
                "which takes the optimizer's moving average instead"
            )
        return found
    keys = OF_STATE[criterion]
    found = [_first(optimizer.state.get(w, {}), keys) for w in bound.weights]
    if all(average is None for average in found):
        raise StateError(
            f"criterion={criterion!r} needs {' or '.join(keys)} in the optimizer's state, but "
            f"{type(optimizer).__name__} has none: train with {KEEPING[criterion]}, or use another "
            f"criterion ({', '.join((*OF_WEIGHTS, *OF_GRADIENTS))})"
        )
    return found


def _first(state: Mapping[str, Any], keys: Sequence[str]) -> Tensor | None:
    for key in keys:
        value = state.get(key)
        if isinstance(value, Tensor):
            return value
    return None
