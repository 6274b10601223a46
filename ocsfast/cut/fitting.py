"""A dense model takes the widths of the cut model whose weights are loaded into it.

Training frameworks restore the model first and whatever else was saved later, so the widths have to
come from the weights themselves: groups of a family are interchangeable, the shapes say how many are
left, and sizes that no shape shows (heads, groups of a convolution) follow from these counts as in any
cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ocsfast.api.arguments import Inputs, families_of, unpacked
from ocsfast.api.calls import options_of
from ocsfast.core.config import Config
from ocsfast.core.errors import StateError
from ocsfast.core.families import Axis, Families
from ocsfast.cut.record import record_of
from ocsfast.cut.removal import cut_model
from ocsfast.ops.cost import make_record


def fit_on_load(
    model: nn.Module, example_inputs: Inputs, *, config: Config | None = None, **config_fields: Any
) -> None:
    """Let the next `load_state_dict` of a dense model cut it to the widths of the weights that arrive.

    For weights that were saved as a plain state dict; a file of `ocsfast.save` needs none of this.
    A model with a pruner does so anyway. The structure is looked for only once other shapes come.

    Args:
        model: as dense as when the saved one was built.
        example_inputs, config, **config_fields: those of the run that cut the saved one, see `step`.

    Raises, from `load_state_dict`, before anything is changed:
        StateError: no cut of the model has these shapes.
    """
    options = options_of(config, config_fields)

    def fit(module: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
        own = module.state_dict(keep_vars=True)
        if all(shape == own[name].shape for name, shape in shapes.items() if name in own):
            return
        families = families_of(module, unpacked(example_inputs), options)
        pruned = surplus(families, shapes)
        if pruned is not None:
            parameters = dict(module.named_parameters())
            record = make_record(families, pruned, parameters, record_of(module))
            cut_model(module, families, pruned, record=record)

    model.register_load_state_dict_pre_hook(FitHook(fit))  # type: ignore[no-untyped-call]


class FitHook:
    """A load_state_dict pre-hook; copies and pickles of the model do not take it along."""

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
    """A hook that does nothing."""

    def __call__(self, *_: Any, **__: Any) -> None:
        return None


def surplus(families: Families, shapes: Mapping[str, torch.Size]) -> Tensor | None:
    """Which groups to cut so that the model has the arriving shapes; None where it has them already.

    Args:
        shapes: of the tensors in a state dict, by name. Those that are missing say nothing.

    Returns:
        [num_groups] bool: the last groups of each family, as many as are too many.

    Raises:
        StateError: no cut of the model has these shapes.
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
    """fixed + the sum of width * kept groups over an axis's families = its size."""

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
        return ", ".join(self.families.families[f].name for f in self.widths)

    def unknown(self, kept: Mapping[int, int]) -> int:
        return sum(f not in kept for f in self.widths)

    def solve(self, kept: dict[int, int]) -> None:
        """Add the one family that is still unknown, if any, and see that the size is right."""
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
