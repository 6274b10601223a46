"""Rules of operators that make a tensor of a size: what a module's attribute sizes follows it."""

from __future__ import annotations

from typing import Any

from ocsfast.grouping.propagate import FACTORIES, Node, Value, Walk, rule, shape
from ocsfast.grouping.rules.pointwise import asked_for


@rule(*FACTORIES)
def constant(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """Every element alike: `torch.zeros(1, self.num_heads, n, n)` shrinks with num_heads."""
    return tuple(asked_for(walk, node, place, size) for place, size in enumerate(shape(node)))
