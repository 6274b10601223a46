"""Sizes read off one tensor and asked of another: `B, N, C = x.shape; y.reshape(B, N, C)`.

After a cut the first tensor's size is another, and so is what the code asks for: the two dimensions have
to shrink together.
"""

from __future__ import annotations

import weakref
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

NUMBER = "ocsfast_number"  # on the node whose tensor was asked for its shape
SIZES = "ocsfast_sizes"  # on the node that was given the size
_next = count()


class SizeOf(int):
    """A tensor's size while it is traced. What is computed from it is a plain integer again."""

    number: int  # of the node that made the tensor
    dim: int


def remembered(func: Any, args: Any, result: Any) -> Any:
    """The same sizes, each knowing which tensor's it is, where `func` asked a tensor for its shape."""
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
    mode = get_proxy_mode()
    slot: Any = get_proxy_slot(tensor, mode.tracer, None) if mode is not None else None
    if slot is None:
        return None
    meta = slot.proxy.node.meta
    custom = meta.get("custom", {})
    if NUMBER not in custom:
        meta["custom"] = custom = {**custom, NUMBER: next(_next)}
    return int(custom[NUMBER])


def sizes_in(numbers: list[int]) -> dict[int, tuple[int, int]]:
    """Place among a call's integers -> (number of the tensor whose size it is, dimension)."""
    return {k: (n.number, n.dim) for k, n in enumerate(numbers) if isinstance(n, SizeOf)}


def whose_size(node: torch.fx.Node, place: int) -> tuple[torch.fx.Node, int] | None:
    """The tensor whose size the integer at this place of the call is, and the dimension."""
    return sizes_of(node).get(place)


def sizes_of(node: torch.fx.Node) -> dict[int, tuple[torch.fx.Node, int]]:
    """Every integer of the call that is a tensor's size: its place -> the tensor, the dimension."""
    known = node.meta.get("custom", {}).get(SIZES, {})
    if not known:
        return {}
    numbered = _asked.get(node.graph)
    if numbered is None:
        custom = ((other, other.meta.get("custom", {})) for other in node.graph.nodes)
        numbered = _asked[node.graph] = {own[NUMBER]: other for other, own in custom if NUMBER in own}
    return {place: (numbered[n], dim) for place, (n, dim) in known.items() if n in numbered}


# The nodes of a graph whose tensors were asked for their shapes, by number.
_asked: weakref.WeakKeyDictionary[torch.fx.Graph, dict[int, torch.fx.Node]] = weakref.WeakKeyDictionary()
