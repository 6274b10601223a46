"""Copies of models to try cuts on, whatever else than parameters and buffers the models hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ocsfast.grouping.trace.snapshot import Snapshot


def copied(model: nn.Module, *, double: bool = False) -> nn.Module:
    """A deep copy of a model, also of one that `copy.deepcopy` refuses.

    A tensor that is no leaf of autograd, as old weight_norm leaves it, is copied by its values. The copy
    shares with the model what cannot be copied (locks, open files) and what is large and no state of a
    module: a trainer's data, reached through a hook that is the trainer's method.

    Args:
        model: what to copy.
        double: whether floating-point tensors become float64, also those that are no buffers.
    """
    with _Copying(double):
        snapshot = Snapshot(model, values=False)
        large = {id(thing): thing for thing in snapshot.large}
        try:
            copy_of = copy.deepcopy(model, dict(large))
        except Exception:
            shared = {id(thing): thing for thing in snapshot.others if not _copies(thing)}
            if not shared:
                raise
            copy_of = copy.deepcopy(model, {**large, **shared})
    return copy_of.double() if double else copy_of


def _copies(thing: Any) -> bool:
    """Whether an object can be copied."""
    try:
        copy.deepcopy(thing)
    except Exception:
        return False
    return True


class _Copying(TorchFunctionMode):
    """While it is entered, `copy.deepcopy` of a plain tensor detaches it."""

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
                to_double = self._double and value.is_floating_point()
                memo[id(tensor)] = value.double() if to_double else value
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))
