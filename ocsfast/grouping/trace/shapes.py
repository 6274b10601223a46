"""Sizes that the code reads off one tensor and asks of another: `B, N, C = x.shape; y.reshape(B, N, C)`.

After a cut the size of the first tensor is another, and so is what the code asks of the second. The two
dimensions therefore have to shrink together. While the model is traced, every size is an integer that
remembers its tensor and dimension, and the call that receives it notes both on its node.
"""

from __future__ import annotations

import weakref
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

# Keys of a node's metadata.
NUMBER = "ocsfast_number"  # of a node whose tensor was asked for its shape: a number that names it
SIZES = "ocsfast_sizes"  # of a node that was given such a size: place -> (number, dimension)
_next = count()
Place = int | tuple[int, str]  # of an integer among those of a call; see `origins.origins_of`


class SizeOf(int):
    """The size of a traced tensor. Arithmetic on it gives a plain integer."""

    number: int  # names the node that made the tensor
    dim: int


def remembered(func: Any, args: Any, result: Any) -> Any:
    """The result of `func(*args)`, its sizes as `SizeOf` where `func` asks a tensor for its shape."""
    if func not in (Tensor.size, Tensor.shape.__get__):  # type: ignore[attr-defined]
        return result
    number = _number_of(args[0])
    if number is None:
        return result
    if isinstance(result, torch.Size):
        known = [_size_of(s, number, d) for d, s in enumerate(result)]
        return torch.Size(known)
    return _size_of(result, number, args[1]) if len(args) > 1 and isinstance(result, int) else result


def _size_of(size: Any, number: int, dim: int) -> Any:
    if type(size) is not int:
        return size
    known = SizeOf(size)
    known.number, known.dim = number, dim
    return known


def _number_of(tensor: Tensor) -> int | None:
    """The number of the node that made a tensor, given at the first question; None outside a trace."""
    mode = get_proxy_mode()
    slot: Any = get_proxy_slot(tensor, mode.tracer, None) if mode is not None else None
    if slot is None:
        return None
    meta = slot.proxy.node.meta
    custom = meta.get("custom", {})
    if NUMBER not in custom:
        meta["custom"] = custom = {**custom, NUMBER: next(_next)}
    return int(custom[NUMBER])


def sizes_in(numbers: dict[Place, int]) -> dict[Place, tuple[int, int]]:
    """Place among a call's integers -> (number of the tensor's node, dimension), for each `SizeOf`."""
    return {k: (n.number, n.dim) for k, n in numbers.items() if isinstance(n, SizeOf)}


def whose_size(node: torch.fx.Node, place: Place) -> tuple[torch.fx.Node, int] | None:
    """The tensor and dimension whose size the integer at this place of the call is; None: no size."""
    return sizes_of(node).get(place)


def sizes_of(node: torch.fx.Node) -> dict[Place, tuple[torch.fx.Node, int]]:
    """Every integer of the call that is a tensor's size: its place -> (the tensor, the dimension)."""
    known = node.meta.get("custom", {}).get(SIZES, {})
    if not known:
        return {}
    numbered = _numbered.get(node.graph)
    if numbered is None:
        custom = ((other, other.meta.get("custom", {})) for other in node.graph.nodes)
        numbered = _numbered[node.graph] = {own[NUMBER]: other for other, own in custom if NUMBER in own}
    return {place: (numbered[n], dim) for place, (n, dim) in known.items() if n in numbered}


# Of each graph: the nodes whose tensors were asked for their shapes, by number.
_numbered: weakref.WeakKeyDictionary[torch.fx.Graph, dict[int, torch.fx.Node]] = (
    weakref.WeakKeyDictionary()
)
