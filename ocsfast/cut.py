"""The cut: pruned groups leave the model, and every parameter stays the same object.

Whole or not at all: everything that can fail happens before the first change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ocsfast.errors import StateError
from ocsfast.grouping.families import Families, kept_indices
from ocsfast.model_config import describes_itself, update_config
from ocsfast.plan import is_channels_last

logger = logging.getLogger("ocsfast")


@dataclass(frozen=True, eq=False)
class _Swap:
    """What one tensor becomes: all of it computed before anything changes."""

    tensor: Tensor
    data: Tensor
    grad: Tensor | None
    states: tuple[tuple[dict[str, Any], dict[str, Tensor]], ...]  # (a state to update, its new tensors)


def cut_model(
    model: nn.Module, families: Families, pruned: Tensor, optimizers: Sequence[Optimizer] = ()
) -> Families:
    """Remove the groups of `pruned` from the model and from the optimizers' state.

    Parameters and buffers keep their identity, device, dtype, memory format and hooks; gradients and
    every optimizer state tensor of a parameter's shape are sliced with it; size attributes are set, and
    the `config` of a transformers model as far as it can say what is left. A tensor with several names
    is sliced once.

    Args:
        model: the model `families` describes. Any copy of it (say, a moving average) does as well.
        pruned: [num_groups] bool, on any device.
        optimizers: whose state to slice.

    Returns:
        The families that are left.

    Raises:
        StateError: a tensor or an attribute does not have the size that `families` says, or a family
            would be emptied. Nothing has been changed then.
    """
    left, became = remove_groups(model, families, pruned, optimizers)
    misfits = update_config(model, became) if describes_itself(model) else 0
    if misfits:
        logger.warning(
            "no value of the model's config says what was cut (%d dimensions differ): from_pretrained "
            "cannot read it; use ocsfast.save and ocsfast.load, or prune with uniform=True",
            misfits,
        )
    return left


def remove_groups(
    model: nn.Module, families: Families, pruned: Tensor, optimizers: Sequence[Optimizer] = ()
) -> tuple[Families, dict[int, set[int]]]:
    """`cut_model` without the config; also what sizes became: before the cut -> after it."""
    gone = pruned.detach().cpu()
    if gone.dtype != torch.bool or gone.shape != (families.num_groups,):
        raise StateError(
            f"pruned= must be [{families.num_groups}] bool, it is {list(gone.shape)} {gone.dtype}"
        )
    for family in families.families:
        if family.size and bool(gone[family.first : family.first + family.size].all()):
            raise StateError(f"family {family.name} would lose all its {family.size} groups")
    with torch.no_grad():
        swaps = [
            _prepare(tensor, _cropper(kept), optimizers)
            for tensor, kept in _kept_axes(model, families, gone)
        ]
    attributes = _kept_attributes(model, families, gone)
    left = families.cropped(gone)

    became: dict[int, set[int]] = {}
    for swap in swaps:
        for old, new in zip(swap.tensor.shape, swap.data.shape, strict=True):
            became.setdefault(old, set()).add(new)
        _apply(swap)
    for module, name, size in attributes:
        became.setdefault(size_attributes(module)[name], set()).add(size)
        set_size(module, name, size)
    # Autocast keeps low-precision copies of the weights by identity, which the cut preserves.
    torch.clear_autocast_cache()
    return left, became


def _kept_axes(
    model: nn.Module, families: Families, gone: Tensor
) -> list[tuple[Tensor, dict[int, Tensor]]]:
    """Each tensor that shrinks, once whatever its names, with the indices that stay along its axes."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    axes: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
    for axis in families.axes:
        tensor = named.get(axis.tensor)
        if tensor is None:
            raise StateError(f"the model has no parameter or buffer {axis.tensor}")
        if axis.axis >= tensor.dim() or tensor.shape[axis.axis] != axis.groups.numel():
            raise StateError(
                f"{axis.tensor} has shape {tuple(tensor.shape)}, but axis {axis.axis} should have "
                f"{axis.groups.numel()} indices: the model's structure has changed since it was grouped"
            )
        kept = kept_indices(axis.groups, gone)
        if kept.numel() == axis.groups.numel():
            continue
        known = axes.setdefault(id(tensor), (tensor, {}))[1]
        if axis.axis in known and not torch.equal(known[axis.axis], kept):
            raise StateError(f"{axis.tensor} is tied, and its names disagree on what goes")
        known[axis.axis] = kept
    return list(axes.values())


def _cropper(kept: Mapping[int, Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that takes the kept indices along each axis and keeps the memory format."""

    def crop(tensor: Tensor) -> Tensor:
        cropped = tensor.detach()
        for axis, indices in kept.items():
            cropped = cropped.index_select(axis, indices.to(tensor.device))
        if is_channels_last(tensor):  # index_select always returns a contiguous tensor
            form = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
            cropped = cropped.contiguous(memory_format=form)
        return cropped

    return crop


def _prepare(tensor: Tensor, crop: Callable[[Tensor], Tensor], optimizers: Sequence[Optimizer]) -> _Swap:
    states = []
    if isinstance(tensor, nn.Parameter):
        for optimizer in optimizers:
            if tensor in optimizer.state:
                state: dict[str, Any] = optimizer.state[tensor]
                states.append((state, sliced_state(optimizer, tensor, crop)))
    grad = None if tensor.grad is None else crop(tensor.grad)
    return _Swap(tensor, crop(tensor), grad, tuple(states))


def _apply(swap: _Swap) -> None:
    tensor = swap.tensor
    tensor.grad = None
    replace_data(tensor, swap.data)
    tensor.grad = swap.grad
    for state, new in swap.states:
        state.update(new)


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor data of another shape; it stays the same object, with its hooks.

    Assigning directly would keep the node that accumulates gradients, which remembers the old shape
    while any old graph is alive; a change of dtype drops it.
    """
    other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


def _kept_attributes(
    model: nn.Module, families: Families, gone: Tensor
) -> list[tuple[nn.Module, str, int]]:
    """The size attributes to set, checked against what they are now."""
    values: dict[tuple[str, str], tuple[nn.Module, int]] = {}
    for attribute in families.attributes:
        where = f"{attribute.module}.{attribute.name}".lstrip(".")
        module = model.get_submodule(attribute.module)
        now = size_attributes(module).get(attribute.name)
        if now != attribute.groups.numel():
            raise StateError(f"{where} is {now}, but {attribute.groups.numel()} when it was grouped")
        kept = int(kept_indices(attribute.groups, gone).numel())
        key = (attribute.module, attribute.name)
        if values.setdefault(key, (module, kept))[1] != kept:
            raise StateError(f"{where}: its records disagree ({values[key][1]} or {kept} stay)")
    return [(module, name, kept) for (_, name), (module, kept) in values.items()]


def size_attributes(module: nn.Module) -> dict[str, int]:
    """The module's integers that may be sizes, by name: "num_heads", or "splits[1]" inside a sequence.

    Of `normalized_shape` it is the last entry, called like the whole.
    """
    found = {}
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if type(value) is int:
            found[name] = value
        elif isinstance(value, (tuple, list)) and value and all(type(entry) is int for entry in value):
            if name == "normalized_shape":
                found[name] = value[-1]
            else:
                found.update({f"{name}[{k}]": entry for k, entry in enumerate(value)})
    return found


def set_size(module: nn.Module, name: str, size: int) -> None:
    """Set what `size_attributes` calls by this name."""
    whole, _, place = name.partition("[")
    value = getattr(module, whole)
    if isinstance(value, (tuple, list)):
        entries = list(value)
        entries[int(place[:-1]) if place else -1] = size
        setattr(module, whole, type(value)(entries))
    else:
        setattr(module, whole, size)


def sliced_state(
    optimizer: Optimizer, parameter: nn.Parameter, crop: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The state tensors of `parameter`'s shape, cropped; nothing is changed yet."""
    state = optimizer.state.get(parameter, {})
    return {
        key: crop(value)
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }
