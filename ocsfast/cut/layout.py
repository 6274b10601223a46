"""Cutting a tensor, wherever it lies, and what an optimizer remembers of a parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ocsfast.cut.agreement import raised_together
from ocsfast.ops.plan import is_channels_last

# (key, value, shape of the parameter, kept indices along each axis that shrinks) -> the cut value
Slicer = Callable[[str, Tensor, torch.Size, Mapping[int, Tensor]], Tensor]
Kept = Mapping[int, Tensor]

_slicers: dict[type[Optimizer], Slicer] = {}


def register_slicer(optimizer_class: type[Optimizer], slicer: Slicer) -> None:
    """Teach the cut an optimizer whose state has shapes of its own.

    State tensors of one element, of the parameter's shape, or of that shape with some sizes 1 are cut
    without being asked for, and so are `exp_avg_sq_row` and `exp_avg_sq_col` of the usual Adafactors.
    `slicer` gets every other tensor, those in a list or tuple one by one.

    Args:
        optimizer_class: it holds for subclasses too, unless they have their own.
        slicer: `slicer(key, value, shape, kept)` returns the cut value and changes nothing. `key` is the
            state's name ("exp_avg", or "preconditioners[1]" in a list), `value` its tensor, `shape` the
            parameter's before the cut; `kept` maps each of its axes that shrinks to the indices that
            stay, [n] int64 on the CPU, ascending.
    """
    _slicers[optimizer_class] = slicer


def is_split(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked without importing them, which takes a second."""
    return hasattr(tensor, "placements")


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds but a part of some parameter, as after `fully_shard`."""
    if any(base.__name__ == "FSDPModule" for m in model.modules() for base in type(m).__mro__):
        return True
    return any(is_split(parameter) for parameter in model.parameters())


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor data of another shape; it stays the same object, with its hooks.

    Assigning directly would keep the node that accumulates gradients, which remembers the old shape
    while any old graph is alive; a change of dtype drops it.
    """
    other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


def crop(tensor: Tensor, kept: Kept) -> Tensor:
    """The kept indices along each axis, in the same memory format."""
    cropped = tensor.detach()
    for axis, indices in kept.items():
        cropped = cropped.index_select(axis, indices.to(tensor.device))
    if is_channels_last(tensor):  # index_select always returns a contiguous tensor
        form = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        cropped = cropped.contiguous(memory_format=form)
    return cropped


def announce(module: nn.Module) -> None:
    """Let compiled code see that tensors of a module have other sizes now.

    torch.compile of torch 2.10 and 2.11 compares them only where the dictionary that holds them has
    changed since, and a tensor with new data is still the same object in the same dictionary.
    """
    for part in module.modules():
        holders: tuple[Any, ...] = (part._parameters, part._buffers)
        for held in holders:
            for name, tensor in held.items() if isinstance(held, dict) else ():
                try:
                    held[name] = None
                finally:
                    held[name] = tensor


def agreement(module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """What goes around what must fail in every process that holds a part of a module if it does in one.

    Raises:
        StateError: as for `layout_of`.
    """
    if not is_sharded(module):
        return nullcontext
    from ocsfast.cut.shards import (
        group_of,  # torch's DTensor takes a second to import
    )

    group = group_of(module)
    return nullcontext if group is None else partial(raised_together, group)


class Layout:
    """How the tensors of a module lie: each whole, in this process. A cut calls its methods in order.

    All of `crop` comes first, then `arrive`, then all of `place`; the model changes in `place` alone.
    """

    def crop(self, tensor: Tensor, kept: Kept) -> Tensor:
        """A new tensor of the kept indices; where they lie elsewhere, `arrive` fills it."""
        return crop(tensor, kept)

    def arrive(self, cropped: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Get what lies elsewhere. Every process has to call.

        Args:
            cropped: each parameter or buffer that shrinks, and what `crop` returned for it.
        """

    def place(self, tensor: Tensor, data: Tensor, undo: ExitStack) -> None:
        """Give a tensor its new data; closing `undo` takes it back."""
        undo.callback(replace_data, tensor, tensor.detach())
        replace_data(tensor, data)


def layout_of(module: nn.Module) -> Layout:
    """How its tensors lie.

    Raises:
        StateError: it is sharded in a way that this torch keeps other records of.
    """
    if not is_sharded(module):
        return Layout()
    from ocsfast.cut.shards import ShardedLayout

    return ShardedLayout(module)


def sliced_state(optimizer: Optimizer, parameter: Tensor, kept: Kept, layout: Layout) -> dict[str, Any]:
    """What changes in the optimizer's state of a parameter, cut; nothing is changed yet."""
    return {
        key: _sliced(optimizer, key, value, parameter.shape, kept, layout)
        for key, value in optimizer.state.get(parameter, {}).items()
        if _holds_tensors(value)
    }


def unsliceable(optimizer: Optimizer) -> str | None:
    """The first thing in the optimizer's state that nobody knows how to cut, in words."""
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
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(entry, Tensor) for entry in value)
    return isinstance(value, Tensor)


def _sliced(
    optimizer: Optimizer, key: str, value: Any, shape: torch.Size, kept: Kept, layout: Layout
) -> Any:
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
    return next((_slicers[base] for base in type(optimizer).__mro__ if base in _slicers), None)


def _axes_of(key: str, value: Tensor, shape: torch.Size) -> list[int | None] | None:
    """Which axis of its parameter each axis of a state tensor is; None where the shapes do not tell.

    None for an axis of size 1, which stays.
    """
    if value.numel() == 1:
        return [None] * value.dim()
    if value.dim() == len(shape) and all(n in (1, m) for n, m in zip(value.shape, shape, strict=True)):
        return [None if n == 1 else axis for axis, n in enumerate(value.shape)]
    if len(shape) >= 2:  # Adafactor's averages over the last dimension, and over the one before
        leading = list(range(len(shape) - 2))
        if key.endswith("_row") and value.shape == shape[:-1]:
            return [*leading, len(shape) - 2]
        if key.endswith("_col") and value.shape == shape[:-2] + shape[-1:]:
            return [*leading, len(shape) - 1]
    return None
