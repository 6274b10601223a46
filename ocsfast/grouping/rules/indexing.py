"""Rules of operators that pick or write indices by number, or copy them.

A number in a model's code, or in one of its constant tensors, goes on meaning the same index only if
nothing before it goes: the dimension it points into is frozen, the others pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ocsfast.grouping.labels import Vector
from ocsfast.grouping.propagate import Node, Value, Walk, freeze, operator_name, rule, shape
from ocsfast.grouping.rules.pointwise import copies
from ocsfast.grouping.rules.products import give_up


def _is_mask(index: Any) -> bool:
    return index.meta["val"].dtype in (torch.bool, torch.uint8)


def _picked(walk: Walk, node: Node, args: dict[str, Any]) -> list[Vector | None]:
    """The labels of x[indices], which stand together in the place of the first, or in front."""
    source, why = node.args[0], walk.reason(node)
    dims, out, places, rank = walk.dims(source), [], [], 0
    d = 0
    for index in args["indices"]:
        if index is None:
            out.append(dims[d])
            d += 1
            continue
        walk.freeze_all(index, why)
        masked = len(shape(index)) if _is_mask(index) else 1
        freeze(walk, dims[d : d + masked], why)
        rank = max(rank, 1 if _is_mask(index) else len(shape(index)))
        places.append((d, len(out)))
        d += masked
    out += dims[d:]
    neighbours = all(k == places[0][0] + n for n, (k, _) in enumerate(places))
    start = places[0][1] if places and neighbours else 0
    return [*out[:start], *[None] * rank, *out[start:]]


@rule("index", "_unsafe_index")
def index(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    out = _picked(walk, node, args)
    return tuple(out) if len(out) == len(shape(node)) else give_up(walk, node)


@rule("index_put", "_unsafe_index_put")
def index_put(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """What is written has the labels of the place it is written to."""
    picked, values = _picked(walk, node, args), args["values"]
    own, why = walk.dims(values), walk.reason(node)
    if len(own) > len(picked):
        return give_up(walk, node)
    for back in range(-len(own), 0):
        if shape(values)[back] > 1:
            walk.labels.unify(picked[back], own[back], why)
    if not any(s > 1 for s in shape(values)):  # one value everywhere, and no zero
        freeze(walk, own, why)
    return walk.dims(node.args[0])


@rule(
    "index_select", "index_fill", "gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce"
)
@rule("index_add", "index_copy")
def along_index(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Dimension `dim` of every operand is frozen; the others mean the same in all of full rank."""
    source, dim, why = node.args[0], args.get("dim"), walk.reason(node)
    if dim is None or not shape(source):
        return give_up(walk, node)
    rank = len(shape(source))
    dim %= rank
    dims = list(walk.dims(source))
    others = [n for n in node.all_input_nodes if n is not source]
    for other in others:
        if len(shape(other)) != rank:
            walk.freeze_all(other, why)
            continue
        for d, vector in enumerate(walk.dims(other)):
            if d == dim or shape(other)[d] != shape(source)[d]:
                walk.labels.freeze(vector, why)
                walk.labels.freeze(dims[d], why)
            # An index of full rank has an entry for every index of the other dimensions.
            elif operator_name(node.target) != "index_select":
                walk.labels.unify(dims[d], vector, why)
    walk.labels.freeze(dims[dim], why)
    sizes = zip(dims, shape(source), shape(node), strict=True)
    return tuple(v if d != dim and old == new else None for d, (v, old, new) in enumerate(sizes))


@rule("masked_select", "nonzero", "unique", "bincount", "histc", "take", "searchsorted", "bucketize")
def by_value(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """How much comes out depends on the data."""
    return give_up(walk, node)


@rule("copy", "slice_scatter", "select_scatter")
def copy(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """What is written over an operand; a view of it keeps the labels of what it views."""
    target, source, why = node.args[0], node.args[1], walk.reason(node)
    if operator_name(node.target) != "copy":
        return give_up(walk, node)
    into, own = walk.dims(target), walk.dims(source)
    lead = len(into) - len(own)
    for d, vector in enumerate(into):
        if d < lead or shape(source)[d - lead] != shape(target)[d]:
            walk.labels.freeze(vector, why)
            if d >= lead:
                walk.labels.freeze(own[d - lead], why)
        else:
            walk.labels.unify(vector, own[d - lead], why)
    return into


# -- copies -------------------------------------------------------------------------------------


@rule("repeat", "tile")
def repeat(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """All copies of an index go with it."""
    source = node.args[0]
    lead = len(shape(node)) - len(shape(source))
    out = [copies(walk, node, place, size) for place, size in enumerate(shape(node)[:lead])]
    for vector, old, new in zip(walk.dims(source), shape(source), shape(node)[lead:], strict=True):
        if old == 1:
            out.append(copies(walk, node, len(out), new))
        else:
            out.append(None if vector is None else np.tile(vector, new // max(1, old)))
    return tuple(out)


@rule("repeat_interleave")
def repeat_interleave(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    source, dim, times = args.get("self"), args.get("dim"), args.get("repeats")
    if source is None or not isinstance(times, int):
        return give_up(walk, node)
    dims = list(walk.dims(source))
    if dim is None:
        dims, dim = [walk.labels.merge(dims, list(shape(source)))], 0
    vector = dims[dim]
    dims[dim] = None if vector is None else np.repeat(vector, times)
    return tuple(dims)


@rule("roll")
def roll(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """By how far stands in the module's code."""
    dims = list(walk.dims(node.args[0]))
    for d in args["dims"] or range(len(dims)):
        walk.labels.freeze(dims[d], walk.reason(node))
        dims[d] = None
    return tuple(dims)
