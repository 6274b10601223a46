"""Whether a model's graph in training says anything that its graph in evaluation does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ocsfast.grouping.propagate import Node, arguments, shape, writes
from ocsfast.grouping.trace.export import Trace
from ocsfast.grouping.trace.origins import origins_of

# What a mode changes in operators that are there in both, and leaves their labels as they are.
_OF_MODE = ("training", "train", "p", "dropout_p")


def same_but_for_mode(a: Trace, b: Trace) -> bool:
    """Whether two graphs of a model differ by dropout and by batch norms' statistics at most."""
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
        if torch.fx.node.map_arg(_plain(one), lambda n: twins.get(n, n)) != _plain(two):
            return False
    return True


def _plain(node: Node) -> dict[str, Any]:
    """A call's arguments by name, but for those that say the mode."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return {"args": node.args, "kwargs": node.kwargs}
    return {name: value for name, value in arguments(node).items() if name not in _OF_MODE}


def _without_counters(traced: Trace) -> list[Node]:
    """The nodes but those that change an integer buffer: a batch norm counts its batches in training."""

    def counts(node: Node) -> bool:
        value = node.meta.get("val")
        integer = isinstance(value, Tensor) and not value.is_floating_point()
        return integer and not node.users and node.op == "call_function" and writes(node)

    return [node for node in traced.graph.graph.nodes if not counts(node)]
