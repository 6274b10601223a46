"""Regions of a traced graph that ran under another autocast or gradient mode, put back in line.

torch.export wraps each such region in a graph of its own. The labels and the proof in float64 depend on
neither mode. Those who run the graph to train it need to know what ran without gradients, so the results
of such a region are detached.
"""

from __future__ import annotations

from typing import Any

import torch

WRAPPERS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")


def inline(graph: torch.fx.GraphModule) -> bool:
    """Replace every call of a wrapped region by the operators in it.

    Returns:
        Whether any region enabled autocast.
    """
    nodes, autocast = graph.graph, False
    wrapped = [n for n in nodes.nodes if getattr(n.target, "__name__", "") in WRAPPERS]
    for node in wrapped:
        places = [k for k, a in enumerate(node.args) if isinstance(a, torch.fx.Node)]
        region, *operands = [node.args[k] for k in places[:1]] + list(node.args[places[0] + 1 :])
        body = getattr(graph, str(region.target))
        autocast |= inline(body)
        # In front of the region: (device, dtype, enabled, cache) of autocast, or (gradients enabled,).
        mode = node.args[: places[0]]
        autocast |= len(mode) > 1 and bool(mode[2])
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        known: dict[torch.fx.Node, Any] = dict(zip(inputs, operands, strict=True))
        with nodes.inserting_before(node):
            results = nodes.graph_copy(body.graph, known)
            if mode == (False,):
                results = torch.fx.node.map_arg(results, lambda n: _detached(nodes, n))
        for user in list(node.users):
            replacement = results[user.args[1]] if isinstance(results, (tuple, list)) else results
            user.replace_all_uses_with(replacement)
            nodes.erase_node(user)
        nodes.erase_node(node)
        if not region.users:
            nodes.erase_node(region)
    if wrapped:
        nodes.lint()
        graph.recompile()
    return autocast


def _detached(nodes: torch.fx.Graph, node: torch.fx.Node) -> torch.fx.Node:
    """A new node that detaches this one's tensor from autograd."""
    detached = nodes.call_function(torch.ops.aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    return detached
