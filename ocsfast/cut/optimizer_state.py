"""What an optimizer remembers of a parameter, and how that is cropped with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ocsfast.cut.layout import Kept, Layout

# (key, value, shape of the parameter, kept indices along each axis that shrinks) -> the cut value
Slicer = Callable[[str, Tensor, torch.Size, Kept], Tensor]

_slicers: dict[type[Optimizer], Slicer] = {}


def register_slicer(optimizer_class: type[Optimizer], slicer: Slicer) -> None:
    """Teach the cut an optimizer whose state tensors have shapes of their own.

    Most optimizers need no slicer. The cut crops by itself every state tensor that has one element, the
    parameter's shape, or that shape with some sizes 1; and `exp_avg_sq_row` and `exp_avg_sq_col` of the
    usual Adafactor implementations. The slicer is asked about every other tensor; for a list or tuple of
    tensors, about each entry.

    Args:
        optimizer_class: the class whose state the slicer knows. Its subclasses use the same slicer
            unless they have one of their own.
        slicer: called as `slicer(key, value, shape, kept)`, it returns the cropped tensor and changes
            nothing. `key` is the name of the state ("exp_avg", or "preconditioners[1]" for an entry of a
            list). `value` is the state's tensor. `shape` is the parameter's shape before the cut. `kept`
            maps each axis of the parameter that shrinks to the indices that stay along it, [n] int64 on
            the CPU, ascending.

    Returns:
        None. A second call for the same class replaces the slicer.

    Raises:
        Nothing here. What the slicer raises at the cut is passed on, and the cut is undone.

    Examples:
        An optimizer that remembers one number for each row of a parameter.

        >>> import torch, ocsfast
        >>> class RowSGD(torch.optim.SGD):
        ...     def step(self, closure=None):
        ...         super().step(closure)
        ...         for p in self.param_groups[0]["params"]:
        ...             self.state[p]["row_norms"] = p.detach().flatten(1).norm(dim=1)  # [rows]
        >>> def crop_row_norms(key, value, shape, kept):
        ...     return value[kept[0]] if key == "row_norms" and 0 in kept else value
        >>> ocsfast.register_slicer(RowSGD, crop_row_norms)
    """
    _slicers[optimizer_class] = slicer


def sliced_state(optimizer: Optimizer, parameter: Tensor, kept: Kept, layout: Layout) -> dict[str, Any]:
    """The tensors in an optimizer's state of a parameter, cropped, by key. Nothing is changed yet."""
    return {
        key: _sliced(optimizer, key, value, parameter.shape, kept, layout)
        for key, value in optimizer.state.get(parameter, {}).items()
        if _holds_tensors(value)
    }


def unsliceable(optimizer: Optimizer) -> str | None:
    """The first entry of an optimizer's state that cannot be cropped, in words; None if all can be."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, (bool, int, float, str, type(None))):
                continue
            if not _holds_tensors(value):
                return f"its state {key!r} is a {type(value).__name__}"
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                axes = _axes_of(key, tensor, parameter.shape)
                if axes is None and _slicer_for(optimizer) is None:
                    return (
                        f"its state {key!r} (shape {tuple(tensor.shape)}) of a parameter of shape "
                        f"{tuple(parameter.shape)} is neither a scalar nor of that shape"
                    )
    return None


def _holds_tensors(value: Any) -> bool:
    """Whether a state's value is a tensor, or a list or tuple of nothing but tensors."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(entry, Tensor) for entry in value)
    return isinstance(value, Tensor)


def _sliced(
    optimizer: Optimizer, key: str, value: Any, shape: torch.Size, kept: Kept, layout: Layout
) -> Any:
    """One value of a state, cropped: along its own axes, or by the optimizer's slicer."""
    if isinstance(value, (list, tuple)):
        entries = enumerate(value)
        return type(value)(_sliced(optimizer, f"{key}[{k}]", v, shape, kept, layout) for k, v in entries)
    axes = _axes_of(key, value, shape)
    if axes is None:
        slicer = _slicer_for(optimizer)
        return value if slicer is None else slicer(key, value, shape, kept)
    along = {own: kept[axis] for own, axis in enumerate(axes) if axis is not None and axis in kept}
    return layout.crop(value, along) if along else value


def _slicer_for(optimizer: Optimizer) -> Slicer | None:
    """The slicer of the nearest class among an optimizer's base classes that has one."""
    return next((_slicers[base] for base in type(optimizer).__mro__ if base in _slicers), None)


def _axes_of(key: str, value: Tensor, shape: torch.Size) -> list[int | None] | None:
    """For each axis of a state tensor, the axis of the parameter that it runs along.

    Returns:
        None for an axis of size 1, which stays as it is. None instead of the list if the shapes do not
        tell how the axes correspond.
    """
    if value.numel() == 1:
        return [None] * value.dim()
    if value.dim() == len(shape) and all(n in (1, m) for n, m in zip(value.shape, shape, strict=True)):
        return [None if n == 1 else axis for axis, n in enumerate(value.shape)]
    if len(shape) >= 2:  # Adafactor averages over the last dimension (_row) or the one before (_col)
        leading = list(range(len(shape) - 2))
        if key.endswith("_row") and value.shape == shape[:-1]:
            return [*leading, len(shape) - 2]
        if key.endswith("_col") and value.shape == shape[:-2] + shape[-1:]:
            return [*leading, len(shape) - 1]
    return None
