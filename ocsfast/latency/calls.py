"""An operator alone, on tensors of any widths, ready to be called."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ocsfast.grouping.trace.nodes import Node, operator_name
from ocsfast.latency.graph import Layout, Site
from ocsfast.latency.sides import Side

COLD = 64 * 2**20  # bytes of weights that pass before one is met again: more than caches hold


@dataclass(frozen=True, eq=False)
class Call:
    """What a clock is given: calling it runs the operator, or the whole model, once.

    Attributes:
        operator: "aten.conv2d.default"; "model" for the whole of it.
        shapes: of the tensors among the arguments, each once.
        device: on which it runs.
    """

    operator: str
    shapes: tuple[tuple[int, ...], ...]
    device: torch.device
    run: Callable[[], object]

    def __call__(self) -> object:
        return self.run()


class Memory:
    """Tensors for calls. Weights are met cold, as in a model whose other weights have passed since."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pools: dict[torch.dtype, Tensor] = {}
        self._next = 0

    def weight(self, layout: Layout) -> Tensor:
        """The next place in a long stretch of memory."""
        size = _extent(layout)
        wanted = max(size, COLD // layout.dtype.itemsize)
        pool = self._pools.get(layout.dtype)
        if pool is None or pool.numel() < wanted:
            pool = self._pools[layout.dtype] = torch.ones(wanted, dtype=layout.dtype, device=self.device)
        # Places begin where allocations do, at multiples of 64 elements.
        begin = self._next if self._next + size <= pool.numel() else 0
        self._next = begin + -(-size // 64) * 64
        return pool[begin : begin + size].as_strided(layout.shape, layout.stride)

    def fresh(self, layout: Layout) -> Tensor:
        """A tensor of its own, of ones."""
        flat = torch.ones(_extent(layout), dtype=layout.dtype, device=self.device)
        return flat.as_strided(layout.shape, layout.stride)


def cropped(site: Site, sides: Sequence[Side], kept: Sequence[int]) -> list[Layout]:
    """The layouts of a call's arguments where each side keeps so many of its indices."""
    layouts = []
    for t, layout in enumerate(site.tensors):
        shape = list(layout.shape)
        for d in range(len(shape)):
            shape[d] = _left(site, sides, kept, t, d)
        layouts.append(replace(layout, shape=tuple(shape), stride=_strides(layout, shape)))
    return layouts


def make_call(
    site: Site, sides: Sequence[Side], kept: Sequence[int], memory: Memory, warm: bool = False
) -> Call:
    """The operator with its sides cropped to so many indices.

    Args:
        warm: whether weights may be in a cache.
    """
    layouts = cropped(site, sides, kept)
    sources = [n for n in site.node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    made = [None if x.parameter and not warm else memory.fresh(x) for x in layouts]

    def run() -> object:
        tensors = [
            memory.weight(layout) if tensor is None else tensor
            for layout, tensor in zip(layouts, made, strict=True)
        ]
        known = dict(zip(sources, tensors, strict=True))
        args, kwargs = torch.fx.node.map_arg((arguments, named), lambda n: known.get(n, n.meta.get("val")))
        return target(*args, **kwargs)

    target, arguments, named = _adapted(site, layouts)
    return Call(site.operation.operator, tuple(x.shape for x in layouts), memory.device, run)


def _adapted(site: Site, layouts: Sequence[Layout]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The operator and its arguments, with those that count indices set to the cropped widths."""
    node: Node = site.node
    target: Any = node.target
    name = operator_name(target)
    given = list(node.args)
    if name in ("reshape", "view", "_unsafe_view", "flatten", "contiguous", "unflatten"):
        # It copies here, or it would be free: one tensor, whatever shape it gets.
        return _copied, (node.all_input_nodes[0],), {}
    places = {argument.name: n for n, argument in enumerate(target._schema.arguments)}
    if "groups" in places and len(layouts) > 1 and places["groups"] < len(given):
        transposed = "transpose" in name or (len(given) > 6 and given[6] is True)
        weight = layouts[1].shape
        given[places["groups"]] = layouts[0].shape[-len(weight) + 1] // weight[1 - transposed] \
            if not transposed else given[places["groups"]]
    if "normalized_shape" in places:
        count = len(given[1])
        given[1] = list(layouts[0].shape[-count:])
    return target, tuple(given), dict(node.kwargs)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _left(site: Site, sides: Sequence[Side], kept: Sequence[int], t: int, d: int) -> int:
    """How many indices of a dimension are left."""
    size = site.tensors[t].shape[d]
    for side, count in zip(sides, kept, strict=True):
        if (t, d) in side.spans:
            return max(1, size * count // side.size)
    labels = site.operation.groups[t][d]
    if labels is None:
        return size
    for side, count in zip(sides, kept, strict=True):
        if bool(torch.isin(labels[labels >= 0], side.labels).all()):  # a part of what the side holds
            return max(1, size * count // side.size)
    return size


def _extent(layout: Layout) -> int:
    """Elements from the first to the last one of a tensor."""
    return 1 + sum((n - 1) * s for n, s in zip(layout.shape, layout.stride, strict=True)) if math.prod(
        layout.shape
    ) else 1


def _strides(layout: Layout, shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor of this shape whose dimensions follow each other as in the layout."""
    strides, step = [0] * len(shape), 1
    for d in sorted(range(len(shape)), key=lambda d: (layout.stride[d], layout.shape[d], -d)):
        if layout.stride[d] > 0 or layout.shape[d] <= 1:
            strides[d] = step
            step *= shape[d]
    return tuple(strides)
