"""The cut: pruned groups leave the model, and every parameter stays the same object.

A cut is made whole or not at all. Everything that can be worked out is worked out before the first
change. If a step after it fails, in this process or in another one that holds a part of the model, all
changes are undone.
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
from ocsfast.cut.layout import Layout, announce
from ocsfast.cut.model_config import describes_itself, integers_of, set_integers, update_config
from ocsfast.cut.optimizer_state import sliced_state
from ocsfast.cut.placement import agreement, layout_of
from ocsfast.cut.record import IN_CONFIG, Record, mark
from ocsfast.cut.sizes import Size, kept_sizes, set_size, size_attributes

logger = logging.getLogger("ocsfast")

# A copy of a model: a module of the same structure, or some of its parameters and buffers, by name.
Copy = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Swap:
    """What one tensor becomes. All of it is computed before anything changes."""

    tensor: Tensor
    data: Tensor
    grad: Tensor | None = None
    # (an optimizer's state of the tensor, the entries of it that change)
    states: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = ()

    def apply(self, layout: Layout, undo: ExitStack) -> None:
        """Give the tensor its data, gradient and states. Closing `undo` takes them back."""
        tensor = self.tensor
        undo.callback(setattr, tensor, "grad", tensor.grad)
        tensor.grad = None  # torch allows no gradient of another shape than the tensor's
        layout.place(tensor, self.data, undo)
        undo.callback(setattr, tensor, "grad", None)
        tensor.grad = self.grad
        for state, new in self.states:
            undo.callback(state.update, {key: state[key] for key in new})
            state.update(new)


@dataclass(frozen=True, eq=False)
class Change:
    """What a cut changes in one module, or in one collection of tensors."""

    module: nn.Module | None  # None: tensors alone
    layout: Layout
    swaps: tuple[Swap, ...]
    sizes: tuple[Size, ...]

    def apply(self, undo: ExitStack) -> dict[int, set[int]]:
        """Make the change. Closing `undo` takes all of it back.

        Returns:
            For each size that a dimension or an attribute had before, the sizes it has now.
        """
        became: dict[int, set[int]] = {}
        for swap in self.swaps:
            for old, new in zip(swap.tensor.shape, swap.data.shape, strict=True):
                became.setdefault(old, set()).add(new)
            swap.apply(self.layout, undo)
        for module, name, size in self.sizes:
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
    """Remove groups from a model, from copies of it, and from the state of its optimizers.

    Every parameter and buffer stays the same object, with its device, dtype, memory format and hooks.
    Gradients and optimizer states are cropped with it (see `register_slicer`). Attributes that count
    indices, such as `out_channels`, are set. So is the `config` of a transformers model, if it can
    describe what is left. A tensor that has several names is cropped once.

    `step` and `Pruner.cut` call this at the cut. Call it yourself to prune by a choice of your own.

    Args:
        model: the model that `families` describes.
        families: what `ocsfast.group` found in it.
        pruned: [families.num_groups] bool, on any device; true where a group goes. Every family must
            keep at least one group.
        optimizers: the optimizers whose state of these parameters is cropped.
        copies: modules of the same structure with values of their own, such as a moving average; or
            dicts of tensors under the names of the parameters or buffers that they are copies of.
        record: what the model and its copies remember of this cut, as a plain dict: its costs and kept
            counts. None: they remember nothing.

    Returns:
        The families that are left, with the groups numbered anew.

    Raises:
        StateError: `pruned` has another shape or dtype; a family would lose all groups; a tensor or an
            attribute does not have the size that `families` says; or a training step is under way.
            Whatever is raised, nothing has been changed then; if the model is sharded, in no process.

    Examples:
        Half of the hidden neurons go.

        >>> import torch, ocsfast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> families = ocsfast.group(model, torch.randn(4, 8))
        >>> families.num_groups
        6
        >>> pruned = torch.tensor([True, False, True, False, True, False])
        >>> left = ocsfast.cut_model(model, families, pruned)
        >>> model[0].weight.shape, model[2].weight.shape, left.num_groups
        (torch.Size([3, 8]), torch.Size([2, 3]), 3)
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
    """`cut_model` as a context: if what is inside raises, the cut is undone."""
    with agreement(model)():
        require_between_steps(model)
    with _removed(model, families, pruned, optimizers, copies) as (left, became, undo):
        modules = list(dict.fromkeys(m for m in (model, *copies) if isinstance(m, nn.Module)))
        for module in modules:
            undo.callback(mark(module, record))
        _update_configs(modules, became, record, undo)
        yield left


def _update_configs(
    modules: Sequence[nn.Module],
    became: Mapping[int, set[int]],
    record: Record | None,
    undo: ExitStack,
) -> None:
    """Let the `config` of transformers models say what they have become, or warn that it cannot."""
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


def require_between_steps(model: nn.Module) -> None:
    """Refuse to cut in the middle of a training step.

    Raises:
        StateError: the model's forward pass, a backward pass, or the capture of a CUDA graph is running.
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
    """`cut_model` without record and config, for copies that grouping tries things on.

    Returns:
        The families that are left; and for each size that was before the cut, the sizes it has become.
    """
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
    """Make the cut; yields what is left, what sizes became, and the stack that undoes the cut.

    The processes that hold a sharded model agree twice: before anything moves between them, and before
    the change becomes final. A validation loop may leave inference mode on; tensors made in it cannot be
    trained, so it is left here.
    """
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
                # Autocast finds its low-precision copies of weights by identity, which a cut preserves.
                torch.clear_autocast_cache()
            yield left, became[0], undo
        undo.pop_all()


def _checked(pruned: Tensor, families: Families) -> Tensor:
    """`pruned` on the CPU, after making sure that it fits and leaves a group in every family."""
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
    """Work out what a cut changes in one copy of the model."""
    module = copy if isinstance(copy, nn.Module) else None
    layout = Layout() if module is None else layout_of(module)
    axes = _kept_axes(_named_tensors(copy), families, gone, whole=module is not None)
    swaps = tuple(_prepare(tensor, kept, optimizers, layout) for tensor, kept in axes)
    sizes = () if module is None else tuple(kept_sizes(module, families, gone))
    return Change(module, layout, swaps, sizes)


def _named_tensors(copy: Copy) -> dict[str, Tensor]:
    """Its parameters and buffers, under each of their names."""
    if not isinstance(copy, nn.Module):
        return dict(copy)
    named: dict[str, Tensor] = dict(copy.named_parameters(remove_duplicate=False))
    named.update(copy.named_buffers(remove_duplicate=False))
    return named


def _kept_axes(
    named: Mapping[str, Tensor], families: Families, gone: Tensor, whole: bool
) -> list[tuple[Tensor, dict[int, Tensor]]]:
    """Each tensor that shrinks, and the indices that stay along each of its axes.

    A tensor with several names comes once.

    Args:
        whole: whether `named` must hold every tensor of `families`. A collection may lack some.

    Raises:
        StateError: a tensor is missing, has another size, or its names disagree on what goes.
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
    """Crop a tensor, its gradient, and what the optimizers remember of it."""
    states = tuple(
        (optimizer.state[tensor], sliced_state(optimizer, tensor, kept, layout))
        for optimizer in optimizers
        if tensor in optimizer.state
    )
    grad = None if tensor.grad is None else layout.crop(tensor.grad, kept)
    return Swap(tensor, layout.crop(tensor, kept), grad, states)
