"""An operator alone, on tensors of any widths, ready to be called."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ocsfast.grouping.graph.program import RESHAPING
from ocsfast.grouping.trace.nodes import operator_name
from ocsfast.latency.graph import Layout, Site
from ocsfast.latency.sides import Side

# What may copy where memory does not lie as the new shape wants it.
COPYING = frozenset({*RESHAPING, "flatten", "contiguous"})
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


def make_call(site: Site, sides: Sequence[Side], kept: Sequence[int], memory: Memory) -> Call:
    """The operator with its sides cropped to so many indices."""
    layouts = cropped(site, sides, kept)
    sources = [n for n in site.node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    made = [None if x.parameter else memory.fresh(x) for x in layouts]

    def run() -> object:
        tensors = [
            memory.weight(layout) if tensor is None else tensor
            for layout, tensor in zip(layouts, made, strict=True)
        ]
        known = dict(zip(sources, tensors, strict=True))
        args, kwargs = torch.fx.node.map_arg(
            (arguments, named), lambda n: known.get(n, n.meta.get("val"))
        )
        return target(*args, **kwargs)

    target, arguments, named = _adapted(site, layouts)
    return Call(site.operation.operator, tuple(x.shape for x in layouts), memory.device, run)


def _adapted(
    site: Site, layouts: Sequence[Layout]
) -> tuple[Callable[..., object], list[Any], dict[str, Any]]:
    """The operator and its arguments, with those that count indices set to the cropped widths."""
    target: Any = site.node.target
    if operator_name(target) in COPYING:  # it copies here, or it would be free
        return _copied, [site.node.all_input_nodes[0]], {}
    given: list[Any] = list(site.node.args)
    places = {argument.name: n for n, argument in enumerate(target._schema.arguments)}
    for name in ("groups", "num_groups"):
        place = places.get(name, len(given))
        if place < len(given) and given[place] > 1:
            given[place] = _groups_left(given[place], name, site, layouts)
    if places.get("normalized_shape", len(given)) < len(given):
        place = places["normalized_shape"]
        given[place] = list(layouts[0].shape[-len(given[place]) :])
    return target, given, dict(site.node.kwargs)


def _groups_left(groups: int, name: str, site: Site, layouts: Sequence[Layout]) -> int:
    """How many of a convolution's or a norm's groups are left: whole ones go, or none."""
    channels = 1 if name == "num_groups" else 1 - len(layouts[1].shape)
    size, left = site.tensors[0].shape[channels], layouts[0].shape[channels]
    return groups * left // size if groups * left % size == 0 else groups


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
    if not math.prod(layout.shape):
        return 1
    return 1 + sum((n - 1) * s for n, s in zip(layout.shape, layout.stride, strict=True))


def _strides(layout: Layout, shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor of this shape whose dimensions follow each other as in the layout."""
    strides, step = [0] * len(shape), 1
    for d in sorted(range(len(shape)), key=lambda d: (layout.stride[d], layout.shape[d], -d)):
        if layout.stride[d] > 0 or layout.shape[d] <= 1:
            strides[d] = step
            step *= shape[d]
    return tuple(strides)
