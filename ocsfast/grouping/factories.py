"""Rules of operators that make a constant tensor: what a module's attribute sizes follows it."""

from __future__ import annotations

from typing import Any

from ocsfast.grouping.labels import Vector
from ocsfast.grouping.propagate import FACTORIES, Node, Value, Walk, rule, shape
from ocsfast.grouping.rules import labels_of_size
from ocsfast.grouping.trace import origins_of


@rule(*FACTORIES)
def constant(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """The same value everywhere: `torch.zeros(1, self.num_heads, n, n)` shrinks with num_heads."""
    dims: list[Vector | None] = []
    for place, size in enumerate(shape(node)):
        origin = origins_of(node).get(place)
        if origin is not None and origin[2] == size > 1:
            vector = walk.labels.fresh(size)
            walk.sized(node, place, vector, size)
            dims.append(vector)
        else:
            dims.append(labels_of_size(walk, node, place, size))
    return tuple(dims)
