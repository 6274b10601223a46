"""How the tensors of a module lie in memory, and how one of them is cropped in place.

`Layout` is for modules whose tensors are whole in this process, `shards.ShardedLayout` for those under
`fully_shard`. `placement.layout_of` chooses between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ocsfast.core.memory_format import in_format_of

Kept = Mapping[int, Tensor]  # axis -> the indices that stay along it, [n] int64 on the CPU, ascending


def is_split(tensor: Tensor) -> bool:
    """Whether it is a DTensor.

    It is recognised by an attribute, because importing torch's DTensor takes a second.
    """
    return hasattr(tensor, "placements")


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of some parameter, as after `fully_shard`."""
    if any(base.__name__ == "FSDPModule" for m in model.modules() for base in type(m).__mro__):
        return True
    return any(is_split(parameter) for parameter in model.parameters())


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor data of another shape. It stays the same object and keeps its hooks.

    Assigning to `.data` alone would keep the autograd node that accumulates its gradients. That node
    remembers the old shape for as long as an old graph is alive, and the next backward pass would fail.
    Passing through an empty tensor of another dtype makes torch drop the node.
    """
    other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


def crop(tensor: Tensor, kept: Kept) -> Tensor:
    """A new tensor of the kept indices along each axis, in the memory format of the old one."""
    cropped = tensor.detach()
    for axis, indices in kept.items():
        cropped = cropped.index_select(axis, indices.to(tensor.device))
    return in_format_of(cropped, tensor)  # index_select always returns a contiguous tensor


def announce(module: nn.Module) -> None:
    """Make compiled code look at the sizes of a module's tensors again.

    torch.compile of torch 2.10 and 2.11 compares the tensors in a dictionary only if the dictionary was
    written to since the last call. A tensor with new data is still the same object in the same place, so
    each place is written to here.
    """
    for part in module.modules():
        holders: tuple[Any, ...] = (part._parameters, part._buffers)
        for held in holders:
            for name, tensor in held.items() if isinstance(held, dict) else ():
                try:
                    held[name] = None
                finally:
                    held[name] = tensor


class Layout:
    """How a cut takes hold of a module's tensors, each of which is whole in this process.

    A cut calls the methods in order: `crop` for every tensor, `arrive` once, then `place` for every
    tensor. Only `place` changes the model.
    """

    def crop(self, tensor: Tensor, kept: Kept) -> Tensor:
        """A new tensor of the kept indices. If they lie in other processes, `arrive` fills it."""
        return crop(tensor, kept)

    def arrive(self, cropped: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Receive what lies in other processes. Every process has to call.

        Args:
            cropped: each parameter or buffer that shrinks, and what `crop` returned for it.
        """

    def place(self, tensor: Tensor, data: Tensor, undo: ExitStack) -> None:
        """Give a tensor its new data. Closing `undo` gives it the old data back."""
        undo.callback(replace_data, tensor, tensor.detach())
        replace_data(tensor, data)
