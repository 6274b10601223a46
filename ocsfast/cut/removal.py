"""The cut: pruned groups leave the model, and every parameter stays the same object.

Whole or not at all: everything that can be worked out is before the first change, and what fails after
it, here or in another process that holds a part of the model, is undone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ocsfast.core.errors import StateError
from ocsfast.core.families import Families, kept_indices
from ocsfast.cut.layout import Layout, agreement, announce, layout_of, sliced_state
from ocsfast.cut.model_config import describes_itself, integers_of, set_integers, update_config
from ocsfast.cut.record import IN_CONFIG, Record, mark

logger = logging.getLogger("ocsfast")

# Of a model: a module of the same structure, or some of its parameters and buffers, by name.
Copy = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Swap:
    """What one tensor becomes: all of it computed before anything changes."""

    tensor: Tensor
    data: Tensor
    grad: Tensor | None = None
    # (a state to update, what changes in it)
    states: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = ()

    def apply(self, layout: Layout, undo: ExitStack) -> None:
        tensor = self.tensor
        undo.callback(setattr, tensor, "grad", tensor.grad)
        tensor.grad = None  # while the shapes differ
        layout.place(tensor, self.data, undo)
        undo.callback(setattr, tensor, "grad", None)
        tensor.grad = self.grad
        for state, new in self.states:
            undo.callback(state.update, {key: state[key] for key in new})
            state.update(new)


@dataclass(frozen=True, eq=False)
class Change:
    """Everything that changes in one module, or one list of tensors, as they take other sizes."""

    module: nn.Module | None
    layout: Layout
    swaps: tuple[Swap, ...]
    attributes: tuple[tuple[nn.Module, str, int], ...]

    def apply(self, undo: ExitStack) -> dict[int, set[int]]:
        """Returns what sizes became: before the cut -> after it; closing `undo` takes all of it back."""
        became: dict[int, set[int]] = {}
        for swap in self.swaps:
            for old, new in zip(swap.tensor.shape, swap.data.shape, strict=True):
                became.setdefault(old, set()).add(new)
            swap.apply(self.layout, undo)
        for module, name, size in self.attributes:
            old = size_attributes(module)[name]
            became.setdefault(old, set()).add(size)
            undo.callback(set_size, module, name, old)
            set_size(module, name, size)
        if self.module is not None:
            announce(self.module)
        return became


def cut_model(
    model: nn.Module,
    families: Families,
    pruned: Tensor,
    optimizers: Sequence[Optimizer] = (),
    copies: Sequence[Copy] = (),
    record: Record | None = None,
) -> Families:
    """Remove the groups of `pruned` from the model, its copies, and the optimizers' state.

    Parameters and buffers keep their identity, device, dtype, memory format and hooks; gradients and
    the optimizers' state (see `register_slicer`) are sliced with them; size attributes are set, and the
    `config` of a transformers model if it can say what is left. A tensor with several names is sliced
    once.

    Args:
        model: the model `families` describes.
        pruned: [num_groups] bool, on any device.
        optimizers: whose state to slice.
        copies: modules of the same structure with values of their own, say a moving average, or
            tensors by the names of the parameters or buffers that they are copies of.
        record: what they all are to know of this cut.

    Returns:
        The families that are left.

    Raises:
        StateError: a tensor or an attribute does not have the size that `families` says, or a family
            would be emptied, or a training step is under way. Whatever is raised, nothing has been
            changed then; of a sharded model, in no process.
    """
    with cutting(model, families, pruned, optimizers, copies, record) as left:
        return left


@contextmanager
def cutting(
    model: nn.Module,
    families: Families,
    pruned: Tensor,
    optimizers: Sequence[Optimizer] = (),
    copies: Sequence[Copy] = (),
    record: Record | None = None,
) -> Iterator[Families]:
    """`cut_model`, around what has to follow it: if that raises, the cut is undone."""
    with agreement(model)():
        require_between_steps(model)
    with _removed(model, families, pruned, optimizers, copies) as (left, became, undo):
        modules = list(dict.fromkeys(m for m in (model, *copies) if isinstance(m, nn.Module)))
        for module in modules:
            undo.callback(mark(module, record))
        describing: list[Any] = [module for module in modules if describes_itself(module)]
        untold = []
        for module in describing:
            undo.callback(set_integers, integers_of(module.config))
            if update_config(module, became):
                untold.append(module)
            else:
                undo.callback(mark(module.config, record, IN_CONFIG))
        if untold:
            logger.warning(
                "no value of the model's config says what was cut, so it stays the dense model's: "
                "from_pretrained cannot read it; use ocsfast.save and ocsfast.load, or prune with "
                "uniform=True"
            )
        yield left


def require_between_steps(model: nn.Module) -> None:
    """Refuse to cut in the midst of a training step.

    Raises:
        StateError: the model's forward pass, a backward pass or the capture of a CUDA graph is running.
    """
    running = None
    if torch._C._current_graph_task_id() != -1:
        running = "a backward pass"
    elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        running = "the capture of a CUDA graph"
    frame = sys._getframe()
    while running is None and frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is model:
            running = "the model's forward pass"
    if running:
        raise StateError(f"{running} is under way: a model can be cut between two training steps only")


def remove_groups(
    model: nn.Module,
    families: Families,
    pruned: Tensor,
    optimizers: Sequence[Optimizer] = (),
    copies: Sequence[Copy] = (),
) -> tuple[Families, dict[int, set[int]]]:
    """`cut_model` without the config; also what sizes became: before the cut -> after it."""
    with _removed(model, families, pruned, optimizers, copies) as (left, became, _):
        return left, became


@contextmanager
def _removed(
    model: nn.Module,
    families: Families,
    pruned: Tensor,
    optimizers: Sequence[Optimizer],
    copies: Sequence[Copy],
) -> Iterator[tuple[Families, dict[int, set[int]], ExitStack]]:
    # The processes that hold the model agree twice: before anything moves between them, and before the
    # change of one of them stays. Made in inference mode, the new tensors could not be trained.
    agreed = agreement(model)
    with agreed(), torch.inference_mode(False), torch.no_grad():
        gone = _checked(pruned, families)
        each = {id(copy): copy for copy in (model, *copies)}.values()
        changes = [_change(copy, families, gone, optimizers) for copy in each]
        left = families.cropped(gone)
    with ExitStack() as undo:
        with agreed():
            with torch.inference_mode(False), torch.no_grad():
                for change in changes:
                    change.layout.arrive([(swap.tensor, swap.data) for swap in change.swaps])
                became = [change.apply(undo) for change in changes]
                # Autocast keeps low-precision copies of the weights by identity, which a cut preserves.
                torch.clear_autocast_cache()
            yield left, became[0], undo
        undo.pop_all()


def _checked(pruned: Tensor, families: Families) -> Tensor:
    """Which groups go: on the CPU, not all of any family."""
    gone = pruned.detach().cpu()
    if gone.dtype != torch.bool or gone.shape != (families.num_groups,):
        raise StateError(
            f"pruned= must be [{families.num_groups}] bool, it is {list(gone.shape)} {gone.dtype}"
        )
    for family in families.families:
        if family.size and bool(gone[family.first : family.first + family.size].all()):
            raise StateError(f"family {family.name} would lose all its {family.size} groups")
    return gone


def _change(copy: Copy, families: Families, gone: Tensor, optimizers: Sequence[Optimizer]) -> Change:
    module = copy if isinstance(copy, nn.Module) else None
    layout = Layout() if module is None else layout_of(module)
    axes = _kept_axes(_named_tensors(copy), families, gone, whole=module is not None)
    swaps = tuple(_prepare(tensor, kept, optimizers, layout) for tensor, kept in axes)
    attributes = () if module is None else _kept_attributes(module, families, gone)
    return Change(module, layout, swaps, tuple(attributes))


def _named_tensors(copy: Copy) -> dict[str, Tensor]:
    if not isinstance(copy, nn.Module):
        return dict(copy)
    named: dict[str, Tensor] = dict(copy.named_parameters(remove_duplicate=False))
    named.update(copy.named_buffers(remove_duplicate=False))
    return named


def _kept_axes(
    named: Mapping[str, Tensor], families: Families, gone: Tensor, whole: bool
) -> list[tuple[Tensor, dict[int, Tensor]]]:
    """Each tensor that shrinks, once whatever its names, with the indices that stay along its axes.

    Args:
        whole: whether all tensors must be there.
    """
    axes: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
    for axis in families.axes:
        tensor = named.get(axis.tensor)
        if tensor is None and not whole:
            continue
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


def _prepare(
    tensor: Tensor, kept: dict[int, Tensor], optimizers: Sequence[Optimizer], layout: Layout
) -> Swap:
    states = tuple(
        (optimizer.state[tensor], sliced_state(optimizer, tensor, kept, layout))
        for optimizer in optimizers
        if tensor in optimizer.state
    )
    grad = None if tensor.grad is None else layout.crop(tensor.grad, kept)
    return Swap(tensor, layout.crop(tensor, kept), grad, states)


def _kept_attributes(
    model: nn.Module, families: Families, gone: Tensor
) -> list[tuple[nn.Module, str, int]]:
    """The size attributes to set, checked against what they are now."""
    values: dict[tuple[str, str], tuple[nn.Module, int]] = {}
    for attribute in families.attributes:
        where = f"{attribute.module}.{attribute.name}".lstrip(".")
        module = model.get_submodule(attribute.module)
        now = size_attributes(module).get(attribute.name)
        if now != attribute.groups.numel() and not attribute.read:
            continue  # a number that was of this size by chance, say a counter
        if now != attribute.groups.numel():
            raise StateError(f"{where} is {now}, but {attribute.groups.numel()} when it was grouped")
        kept = int(kept_indices(attribute.groups, gone).numel())
        key = (attribute.module, attribute.name)
        if values.setdefault(key, (module, kept))[1] != kept:
            raise StateError(f"{where}: its records disagree ({values[key][1]} or {kept} stay)")
    return [(module, name, kept) for (_, name), (module, kept) in values.items()]


def stale_sizes(model: nn.Module, families: Families, pruned: Tensor) -> tuple[str, ...]:
    """The attributes that the cut leaves although they may count what goes, as "layers.2.c = 64"."""
    gone = pruned.detach().cpu()
    stale = []
    for attribute in families.unsure:
        groups = attribute.groups[attribute.groups >= 0]
        value = size_attributes(model.get_submodule(attribute.module)).get(attribute.name)
        if value is not None and bool(gone[groups].any()):
            stale.append(f"{attribute.module}.{attribute.name}".lstrip(".") + f" = {value}")
    return tuple(stale)


def followed_sizes(families: Families, pruned: Tensor) -> tuple[str, ...]:
    """The attributes that follow the cut although no traced code read them, as "1.c: 32 -> 22"."""
    gone = pruned.detach().cpu()
    found = []
    for attribute in families.attributes:
        kept = kept_indices(attribute.groups, gone).numel()
        if not attribute.read and kept != attribute.groups.numel():
            name = f"{attribute.module}.{attribute.name}".lstrip(".")
            found.append(f"{name}: {attribute.groups.numel()} -> {kept}")
    return tuple(found)


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
