"""Copies of models for trials, whatever else than parameters and buffers these hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ocsfast.grouping.trace.side_effects import Kept


def copied(model: nn.Module, *, double: bool = False) -> nn.Module:
    """A deep copy, whatever else than parameters and buffers the model holds.

    Tensors that are no leaves, as old weight_norm leaves them, are copied by their values; objects that
    refuse, as locks and open files do, are shared, and so are large tensors and containers that are no
    part of a module's state: the data of a trainer whose method is a hook.

    Args:
        double: whether floating-point tensors become float64, also where no module knows of them.
    """
    with _Copying(double):
        kept = Kept(model, values=False)
        large = {id(thing): thing for thing in kept.large}
        try:
            copy_of = copy.deepcopy(model, dict(large))
        except Exception:
            shared = {id(thing): thing for thing in kept.others if not _copies(thing)}
            if not shared:
                raise
            copy_of = copy.deepcopy(model, {**large, **shared})
    return copy_of.double() if double else copy_of


def _copies(thing: Any) -> bool:
    try:
        copy.deepcopy(thing)
    except Exception:
        return False
    return True


class _Copying(TorchFunctionMode):
    def __init__(self, double: bool) -> None:
        super().__init__()
        self._double = double

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and type(args[0]) is Tensor and args[0].device.type != "meta":
            tensor, memo = args
            if id(tensor) not in memo:
                value = tensor.detach().clone()
                memo[id(tensor)] = (
                    value.double() if self._double and value.is_floating_point() else value
                )
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))
