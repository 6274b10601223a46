"""Cutting what an optimizer remembers of a parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ocsfast.plan import is_channels_last

# (key, value, shape of the parameter, kept indices along each axis that shrinks) -> the cut value
Slicer = Callable[[str, Tensor, torch.Size, Mapping[int, Tensor]], Tensor]

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


def crop(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """The kept indices along each axis, in the same memory format; of a sharded tensor on every rank."""
    if is_split(tensor):
        from ocsfast.resharding import crop_shards

        return crop_shards(tensor, kept)
    cropped = tensor.detach()
    for axis, indices in kept.items():
        cropped = cropped.index_select(axis, indices.to(tensor.device))
    if is_channels_last(tensor):  # index_select always returns a contiguous tensor
        form = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        cropped = cropped.contiguous(memory_format=form)
    return cropped


def sliced_state(optimizer: Optimizer, parameter: Tensor, kept: Mapping[int, Tensor]) -> dict[str, Any]:
    """What changes in the optimizer's state of a parameter, cut; nothing is changed yet."""
    return {
        key: _sliced(optimizer, key, value, parameter.shape, kept)
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
                if _slicer_for(optimizer, key, tensor, parameter.shape) is None:
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
    optimizer: Optimizer, key: str, value: Any, shape: torch.Size, kept: Mapping[int, Tensor]
) -> Any:
    if isinstance(value, (list, tuple)):
        entries = enumerate(value)
        return type(value)(_sliced(optimizer, f"{key}[{k}]", v, shape, kept) for k, v in entries)
    slicer = _slicer_for(optimizer, key, value, shape)
    return value if slicer is None else slicer(key, value, shape, kept)


def _slicer_for(optimizer: Optimizer, key: str, value: Tensor, shape: torch.Size) -> Slicer | None:
    if value.numel() == 1:
        return _as_it_is
    if value.dim() == len(shape) and all(n in (1, m) for n, m in zip(value.shape, shape, strict=True)):
        return _broadcast
    if len(shape) >= 2:  # Adafactor's averages over the last dimension, and over the one before
        if key.endswith("_row") and value.shape == shape[:-1]:
            return _without_last
        if key.endswith("_col") and value.shape == shape[:-2] + shape[-1:]:
            return _without_last_but_one
    for base in type(optimizer).__mro__:
        if base in _slicers:
            return _slicers[base]
    return None


def _as_it_is(key: str, value: Tensor, shape: torch.Size, kept: Mapping[int, Tensor]) -> Tensor:
    return value


def _broadcast(key: str, value: Tensor, shape: torch.Size, kept: Mapping[int, Tensor]) -> Tensor:
    return crop(value, {axis: indices for axis, indices in kept.items() if value.shape[axis] != 1})


def _without_last(key: str, value: Tensor, shape: torch.Size, kept: Mapping[int, Tensor]) -> Tensor:
    return crop(value, {axis: indices for axis, indices in kept.items() if axis < len(shape) - 1})


def _without_last_but_one(
    key: str, value: Tensor, shape: torch.Size, kept: Mapping[int, Tensor]
) -> Tensor:
    gone = len(shape) - 2
    return crop(value, {min(axis, gone): indices for axis, indices in kept.items() if axis != gone})
