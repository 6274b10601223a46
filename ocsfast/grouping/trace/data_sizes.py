"""Sizes that depend on the data's numbers, as of `x[x > 0]` or of a graph's edges without loops.

A trace has a symbol for such a size. Labels and costs want integers: those of the example inputs. No
index of such a dimension ever goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ocsfast.core.errors import GroupingError


def set_data_sizes(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Replace every symbol in the graph's metadata by the size that the example inputs lead to.

    Args:
        graph: a traced graph; without such sizes it is left as it is, and not run.
        inputs: what its placeholders stand for, on which it is run. It gets copies of tensors.

    Raises:
        GroupingError: the graph does not run.
    """
    if any(_is_symbolic(node.meta.get("val")) for node in graph.graph.nodes):
        own = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), list(inputs))
        try:
            with torch.no_grad():
                _Sizing(graph).run(*own)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise GroupingError(
                f"a size in the model depends on the data, and its traced graph does not run on the "
                f"example inputs ({type(error).__name__}: {first}): pass others, or in forward= what to "
                "run instead"
            ) from error


def _is_symbolic(value: Any) -> bool:
    """Whether a node's value is a symbol, or a tensor of a shape with one."""
    return any(
        isinstance(size, torch.SymInt)
        for x in pytree.tree_leaves(value)
        for size in (x.shape if isinstance(x, Tensor) else (x,))
    )


class _Sizing(torch.fx.Interpreter):
    def run_node(self, n: torch.fx.Node) -> Any:
        out = super().run_node(n)
        if _is_symbolic(n.meta.get("val")):
            n.meta["val"] = pytree.tree_map_only(Tensor, lambda x: x.to("meta"), out)
        return out
