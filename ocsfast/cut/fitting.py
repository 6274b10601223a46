"""Which cut of a dense model gives it the shapes of weights that arrive, and the hook that asks for it.

Training frameworks restore a model's weights first and everything else later, so the widths have to come
from the weights. That is possible because the groups of a family are interchangeable: the shapes tell
how many of each family are left. Sizes that no shape shows, such as the number of heads, follow from
these counts as in any cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ocsfast.core.errors import StateError
from ocsfast.core.families import Axis, Families


class FitHook:
    """A load_state_dict pre-hook that tells `fit` which shapes are about to arrive.

    `fit` gets the module and the shape of each tensor, by the tensor's name within the module. Copies
    and pickles of the module have a hook that does nothing (`Nothing`) in its place.
    """

    def __init__(self, fit: Callable[[nn.Module, Mapping[str, torch.Size]], None]) -> None:
        self._fit = fit

    def __call__(
        self, module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any, **__: Any
    ) -> None:
        shapes = {
            name.removeprefix(prefix): value.shape
            for name, value in state.items()
            if name.startswith(prefix) and isinstance(value, Tensor)
        }
        self._fit(module, shapes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Nothing:
        return Nothing()

    def __reduce__(self) -> tuple[type[Nothing], tuple[()]]:
        return Nothing, ()


class Nothing:
    """A hook that does nothing: what a hook becomes in copies and pickles of its module.

    A copy of a module has copies of its hooks, and what a hook refers to belongs to the original alone.
    """

    def __call__(self, *_: Any, **__: Any) -> None:
        return None


def surplus(families: Families, shapes: Mapping[str, torch.Size]) -> Tensor | None:
    """Which groups to cut so that a model has the shapes that arrive.

    Each axis of a tensor gives one equation (see `_Equation`). Those with one unknown are solved first;
    what they find makes others solvable.

    Args:
        families: of the model as it is now.
        shapes: of the tensors in a state dict, by name. A tensor that is missing gives no equation.

    Returns:
        [num_groups] bool: of each family, the last groups, as many as there are too many. None if the
        model has these shapes already.

    Raises:
        StateError: no cut of the model has these shapes, or they do not determine one.
    """
    members = families.family_of_groups()
    equations = [
        _Equation(axis, families, members, shapes[axis.tensor])
        for axis in families.axes
        if axis.tensor in shapes
    ]
    if all(e.size == e.axis.groups.numel() for e in equations):
        return None
    kept: dict[int, int] = {}
    waiting = equations
    while waiting:
        solved = [e for e in waiting if e.unknown(kept) <= 1]
        if not solved:
            raise StateError(
                f"the weights do not tell how many groups of {waiting[0].names} are left, each: load "
                "with Pruner.load_state_dict first"
            )
        for equation in solved:
            equation.solve(kept)
        waiting = [e for e in waiting if e.unknown(kept) > 1]
    pruned = torch.zeros(families.num_groups, dtype=torch.bool)
    for f, count in kept.items():
        family = families.families[f]
        pruned[family.first + count : family.first + family.size] = True
    return pruned


class _Equation:
    """The size of an axis = fixed + sum over its families of width * kept groups.

    `fixed` counts the indices that belong to no group; `width` is a family's indices per group.
    """

    def __init__(self, axis: Axis, families: Families, members: Tensor, shape: torch.Size) -> None:
        self.axis = axis
        self.families = families
        self.size = shape[axis.axis] if axis.axis < len(shape) else -1
        labelled = axis.groups[axis.groups >= 0]
        self.fixed = axis.groups.numel() - labelled.numel()
        counts = torch.bincount(members[labelled], minlength=len(families.families))
        self.widths = {
            f: int(n) // families.families[f].size for f, n in enumerate(counts.tolist()) if n
        }

    @property
    def names(self) -> str:
        """The names of the families along the axis, for messages."""
        return ", ".join(self.families.families[f].name for f in self.widths)

    def unknown(self, kept: Mapping[int, int]) -> int:
        """How many of its families have no entry in `kept` yet."""
        return sum(f not in kept for f in self.widths)

    def solve(self, kept: dict[int, int]) -> None:
        """Add the one family that is still unknown, if any, to `kept`, and check the size.

        Args:
            kept: family number -> how many of its groups are left.

        Raises:
            StateError: no whole number of groups gives this size.
        """
        left = self.size - self.fixed
        for f, width in self.widths.items():
            left -= width * kept.get(f, 0)
        for f, width in self.widths.items():
            if f not in kept:
                kept[f], left = divmod(left, width)
                if not 1 <= kept[f] <= self.families.families[f].size:
                    left = -1
        if left:
            here = self.axis.groups.numel()
            earlier = ", or of this one before it was cut" if self.size > here else ""
            raise StateError(
                f"{self.axis.tensor} arrives with {self.size} indices along axis {self.axis.axis}, "
                f"which no cut of {here} leaves with the other tensors of {self.names}: the state is of "
                f"another model{earlier}"
            )
