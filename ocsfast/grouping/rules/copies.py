"""Rules of operators that copy indices along a dimension."""

from __future__ import annotations

from typing import Any

import numpy as np

from ocsfast.grouping.rules.registry import rule
from ocsfast.grouping.rules.sizes import copies
from ocsfast.grouping.trace.nodes import Node, shape
from ocsfast.grouping.walk import Value, Walk


@rule("expand", "expand_as", "broadcast_to")
def expand(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """How many copies there are stands in the call: see `copies` for what that ties them to."""
    source, out = shape(node.args[0]), shape(node)
    dims = walk.dims(node.args[0])
    if "other" in args:
        return _expanded_as(walk, node, args["other"])
    lead = len(out) - len(source)
    kept = [copies(walk, node, place, size) for place, size in enumerate(out)]
    for d, (vector, old, new) in enumerate(zip(dims, source, out[lead:], strict=True)):
        if old == new:
            kept[lead + d] = vector
            walk.sized(node, lead + d, vector, new)
        else:
            walk.labels.freeze(vector, walk.reason(node))
    return tuple(kept)


def _expanded_as(walk: Walk, node: Node, other: Any) -> Value:
    """The number of copies follows the other tensor, and so do their labels."""
    dims, source = walk.dims(node.args[0]), shape(node.args[0])
    out = list(walk.dims(other))
    for back in range(-len(source), 0):
        if source[back] == shape(other)[back]:
            out[back] = dims[back]
            walk.labels.unify(dims[back], walk.dims(other)[back], walk.reason(node))
    return tuple(out)


@rule("repeat", "tile")
def repeat(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """The whole dimension again and again: all copies of an index go with it."""
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
    """Each index several times in a row: all its copies go with it."""
    source, dim, times = args.get("self"), args.get("dim"), args.get("repeats")
    if source is None or not isinstance(times, int):
        return walk.give_up(node)
    dims = list(walk.dims(source))
    if dim is None:
        dims, dim = [walk.labels.merge(dims, list(shape(source)))], 0
    vector = dims[dim]
    dims[dim] = None if vector is None else np.repeat(vector, times)
    return tuple(dims)
