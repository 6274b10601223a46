"""Rules of operators that make a tensor of a size."""

from __future__ import annotations

from typing import Any

from ocsfast.grouping.rules.registry import rule
from ocsfast.grouping.rules.sizes import asked_for
from ocsfast.grouping.trace.nodes import Node, shape
from ocsfast.grouping.walk import Value, Walk

# They fill the tensor with one value, or draw every element from one distribution.
FACTORIES = (
    *("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"),
    *("rand", "randn", "randint", "empty_strided", "empty_permuted", "new_empty_strided"),
)


@rule(*FACTORIES)
def constant(walk: Walk, node: Node, args: dict[str, Any]) -> Value:
    """All indices are alike, so any may go: `torch.zeros(1, self.num_heads, n, n)` loses heads."""
    return tuple(asked_for(walk, node, place, size) for place, size in enumerate(shape(node)))
