"""The size literals of a traced graph, as attributes that a cut can set."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ocsfast.cut.sizes import size_attributes
from ocsfast.grouping.trace.export import Trace
from ocsfast.grouping.trace.origins import origins_of


class Sizes(nn.Module):
    """One integer attribute for each size literal of one graph, and the graph's constant tensors.

    The constants are plain attributes, so that they are no part of the model's state dict; they move
    between devices with the module all the same.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Sizes:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                vars(self)[name] = fn(value)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def literals_beyond(model: nn.Module, *traces: Trace) -> bool:
    """Whether a graph that the model runs from has size literals that none of these traces used."""
    held = ((path, module) for path, module in model.named_modules() if isinstance(module, Sizes))
    known = {(path, name) for path, module in held for name in size_attributes(module)}
    return bool(known) and not known <= {
        origin[:2]
        for traced in traces
        for node in traced.graph.graph.nodes
        for origin in origins_of(node).values()
    }
