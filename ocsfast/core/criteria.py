"""The criteria by name, each with its formula: the one table that options, reference and docs read.

A criterion scores a group by the mean, over its slices, of a number that each slice has. That number
comes from a sum (or maximum) over the slice's elements. `csrc/criteria.h` computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A criterion of the user's own. Called with a weight, its gradient or None, and its optimizer state,
# which may be empty; returns what each element of the weight is worth, a tensor of the weight's shape.
CriterionFunction = Callable[[Tensor, Tensor | None, Mapping[str, Any]], Tensor]
Criterion = str | CriterionFunction


@dataclass(frozen=True)
class Formula:
    """How a criterion scores one slice of n elements w; x are the elements in their place elsewhere."""

    text: str  # for people
    element: Callable[[Tensor, Tensor], Tensor]  # (w, x) -> what is summed over the slice
    slice: Callable[[Tensor, Tensor], Tensor]  # (sum, n) -> the slice's number
    x: str = ""  # "gradient", "state" (what the optimizer keeps), or "": no x
    keys: tuple[str, ...] = ()  # x is the first of these that the optimizer's state holds
    keepers: str = ""  # optimizers that hold them
    maximum: bool = False  # whether the slice's largest element counts instead of their sum

    @property
    def reduce(self) -> str:
        """The torch function that joins a slice's elements."""
        return "amax" if self.maximum else "sum"


def _square(w: Tensor, x: Tensor) -> Tensor:
    return w.square()


def _size(w: Tensor, x: Tensor) -> Tensor:
    return w.abs()


_MOMENTUM = {
    "x": "state",
    "keys": ("momentum_buffer", "exp_avg"),
    "keepers": "SGD with momentum, or Adam",
}
_SQUARES = {"x": "state", "keys": ("exp_avg_sq", "square_avg"), "keepers": "Adam or RMSprop"}

CRITERIA: dict[str, Formula] = {
    "l2": Formula("|w|_2 / sqrt(n), Eq. 2", _square, lambda s, n: (s / n).sqrt()),
    "l2_squared": Formula(
        "sum w**2 / sqrt(n), as the authors' released code computes it",
        _square,
        lambda s, n: s / n.sqrt(),
    ),
    "l1": Formula("sum |w| / n", _size, lambda s, n: s / n),
    "linf": Formula("max |w|", _size, lambda s, n: s, maximum=True),
    "taylor": Formula(
        "|sum w x|, x the gradient (first-order Taylor)",
        torch.mul,
        lambda s, n: s.abs(),
        x="gradient",
    ),
    "obd": Formula(
        "sum w**2 x**2 / 2, x the gradient",
        lambda w, x: (w * x).square(),
        lambda s, n: s / 2,
        x="gradient",
    ),
    "taylor_state": Formula(
        "|sum w x|, x the gradient's moving average",
        torch.mul,
        lambda s, n: s.abs(),
        **_MOMENTUM,  # type: ignore[arg-type]
    ),
    "obd_state": Formula(
        "sum w**2 x / 2, x the moving average of the squared gradient",
        lambda w, x: w.square() * x,
        lambda s, n: s / 2,
        **_SQUARES,  # type: ignore[arg-type]
    ),
}


def reads_gradients(criterion: Criterion) -> bool:
    """Whether scores rest on gradients or on an optimizer's state; a function's may."""
    return callable(criterion) or CRITERIA[criterion].x != ""
