"""Rules of operators that pick or write indices by number.

A number in a model's code, or in one of its constant tensors, means the same index after a cut only if
no index before it went. So the dimension that it points into is frozen, and the others pass.
"""

from __future__ import annotations

from typing import Any

import torch

from ocsfast.grouping.labels import Vector
from ocsfast.grouping.rules.registry import rule
from ocsfast.grouping.trace.nodes import Node, operator_name, shape
from ocsfast.grouping.walk import Value, Walk


@rule("index", "_unsafe_index")
def index(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """x[indices]."""
    out = _picked(walk, node, args)
    return tuple(out) if len(out) == len(shape(node)) else walk.give_up(node)


@rule("index_put", "_unsafe_index_put")
def index_put(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """x[indices] = values: what is written has the labels of the place that it is written to."""
    picked, values = _picked(walk, node, args), args["values"]
    own, why = walk.dims(values), walk.reason(node)
    if len(own) > len(picked):
        return walk.give_up(node)
    for back in range(-len(own), 0):
        if shape(values)[back] > 1:
            walk.labels.unify(picked[back], own[back], why)
    if not any(s > 1 for s in shape(values)):  # one number, written everywhere, which may not be zero
        walk.freeze(own, why)
    return walk.dims(node.args[0])


def _picked(walk: Walk, node: Node, args: dict[str, Any]) -> list[Vector | None]:
    """The labels of x[indices].

    What the indices pick becomes one block of new dimensions: in the place of the first index where all
    indices are neighbours, in front otherwise. It has no labels.
    """
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
        walk.freeze(dims[d : d + masked], why)
        rank = max(rank, 1 if _is_mask(index) else len(shape(index)))
        places.append((d, len(out)))
        d += masked
    out += dims[d:]
    neighbours = all(k == places[0][0] + n for n, (k, _) in enumerate(places))
    start = places[0][1] if places and neighbours else 0
    return [*out[:start], *[None] * rank, *out[start:]]


def _is_mask(index: Any) -> bool:
    """A mask of n dimensions picks from n dimensions at once; an index of numbers from one."""
    return index.meta["val"].dtype in (torch.bool, torch.uint8)


@rule(
    "index_select", "index_fill", "gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce"
)
@rule("index_add", "index_copy", "index_reduce")
def along_index(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Dimension `dim` of every operand is frozen; in the others, operands of full rank are equal."""
    source, dim, why = node.args[0], args.get("dim"), walk.reason(node)
    if dim is None or not shape(source):
        return walk.give_up(node)
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
            # `gather` and its like take an entry for every position; index_select a vector.
            elif operator_name(node.target) != "index_select":
                walk.labels.unify(dims[d], vector, why)
    walk.labels.freeze(dims[dim], why)
    sizes = zip(dims, shape(source), shape(node), strict=True)
    return tuple(v if d != dim and old == new else None for d, (v, old, new) in enumerate(sizes))


@rule("copy")
def copy(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """target.copy_(source): equal labels. The target may be a view, whose labels then stay in force."""
    target, source, why = node.args[0], node.args[1], walk.reason(node)
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


@rule("roll")
def roll(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """By how many places stands in the module's code, so the dimension keeps all its indices."""
    dims = list(walk.dims(node.args[0]))
    for d in args["dims"] or range(len(dims)):
        walk.labels.freeze(dims[d], walk.reason(node))
        dims[d] = None
    return tuple(dims)
