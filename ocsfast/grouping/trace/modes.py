"""Whether a model's graph in training says more about its structure than its graph in evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ocsfast.grouping.trace.export import Trace
from ocsfast.grouping.trace.nodes import Node, arguments, shape, writes
from ocsfast.grouping.trace.origins import origins_of

# Arguments by which the operators of dropout and batch norm are told the mode. No label depends on them.
_MODE_ARGUMENTS = ("training", "train", "p", "dropout_p")


def same_but_for_mode(a: Trace, b: Trace) -> bool:
    """Whether two graphs of a model differ at most by dropout and by batch norms' statistics."""
    if (a.state, a.outputs, a.left) != (b.state, b.outputs, b.left):
        return False
    twins: dict[Any, Any] = {}
    mine, other = _without_counters(a), _without_counters(b)
    if len(mine) != len(other):
        return False
    for one, two in zip(mine, other, strict=True):
        twins[one] = two
        if (one.op, one.target) != (two.op, two.target) or shape(one) != shape(two):
            return False
        if origins_of(one) != origins_of(two):
            return False
        if torch.fx.node.map_arg(_without_mode(one), lambda n: twins.get(n, n)) != _without_mode(two):
            return False
    return True


def _without_mode(node: Node) -> dict[str, Any]:
    """A call's arguments by name, without those that say the mode."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return {"args": node.args, "kwargs": node.kwargs}
    return {name: value for name, value in arguments(node).items() if name not in _MODE_ARGUMENTS}


def _without_counters(traced: Trace) -> list[Node]:
    """The nodes without those that only change an integer buffer.

    In training a batch norm counts its batches in one; evaluation has no such node.
    """

    def counts(node: Node) -> bool:
        value = node.meta.get("val")
        integer = isinstance(value, Tensor) and not value.is_floating_point()
        return integer and not node.users and node.op == "call_function" and writes(node)

    return [node for node in traced.graph.graph.nodes if not counts(node)]
