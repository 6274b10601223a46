"""Operators without a rule, spelled out in those that torch composes them of.

`torch.hstack` is a `cat`, `F.cosine_similarity` some products and sums, `F.mse_loss` the mean of a
square. In the place of such a call the graph gets the operators that torch itself would run, which have
rules. Labels and the proof's reference both read that graph; the cut module runs its own code, so the
proof compares one with the other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ocsfast.grouping.operators import is_composed, is_known
from ocsfast.grouping.trace.nodes import COMPOSED, Node
from ocsfast.grouping.trace.shapes import NUMBER


def spell_out(graph: torch.fx.GraphModule) -> None:
    """Replace, in place, every call of an operator that has no rule but that torch composes of others.

    What torch cannot compose of operators on tensors alone is left as it is.
    """
    changed = False
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            compose = composition(node.target)
            changed |= compose is not None and _replaced(graph.graph, node, compose)
    if changed:
        graph.graph.lint()
        graph.recompile()


def composition(target: Any) -> Callable[..., Any] | None:
    """A function that computes what an operator does, of other operators.

    None where the operator needs none, since its labels are known, or where torch has none.
    """
    if is_known(target):
        return None
    if is_composed(target):
        function: Callable[..., Any] = target.decompose
        return function
    return None if target._schema.is_mutable else _table().get(target)


@cache
def _table() -> dict[Any, Callable[..., Any]]:
    """torch's decompositions of operators that have no rule."""
    table: dict[Any, Callable[..., Any]] = dict(torch.export.default_decompositions())
    return {op: f for op, f in table.items() if not is_known(op)}


def _replaced(graph: torch.fx.Graph, node: Node, compose: Callable[..., Any]) -> bool:
    """Put the operators that `compose` runs in the place of the call; whether that was possible."""
    inputs = node.all_input_nodes

    def call(*tensors: Any) -> Any:
        known = dict(zip(inputs, tensors, strict=True))
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        return compose(*args, **kwargs)

    try:
        with torch.no_grad():
            body = make_fx(call, decomposition_table=_table())(*(n.meta["val"] for n in inputs)).graph
    except Exception:  # whatever a composition raises where it needs the tensors' values
        return False
    if any(n.op == "get_attr" for n in body.nodes):  # it makes constants, which hold no data here
        return False
    known = dict(zip((n for n in body.nodes if n.op == "placeholder"), inputs, strict=True))
    with graph.inserting_before(node):
        results: Any = graph.graph_copy(body, known)
    custom = {k: v for k, v in node.meta.get("custom", {}).items() if k == NUMBER}
    for inner, copied in known.items():
        if inner.op == "call_function":
            copied.meta = {**node.meta, "val": inner.meta.get("val"), "custom": {}, COMPOSED: True}
    _use(graph, node, results, custom)
    return True


def _use(graph: torch.fx.Graph, node: Node, results: Any, custom: dict[str, Any]) -> None:
    """Let the users of a call read its results from the nodes in its place."""
    if isinstance(results, Node):
        if NUMBER in custom and NUMBER not in results.meta.get("custom", {}):
            results.meta["custom"] = {**results.meta.get("custom", {}), **custom}
        node.replace_all_uses_with(results)
    else:
        for user in [n for n in node.users if n.target is operator.getitem]:
            part = results[user.args[1]]
            part.meta["custom"] = {**user.meta.get("custom", {}), **part.meta.get("custom", {})}
            user.replace_all_uses_with(part)
            graph.erase_node(user)
    graph.erase_node(node)
