"""Whether a model, its classes and the generators are as they were, object by object and bit by bit."""

from __future__ import annotations

import collections
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import ocsfast
from ocsfast.core.errors import OcsfastError


def deep(thing: Any, seen: set[int] | None = None) -> Any:
    """Equal for equal things only: the same objects, of the same contents."""
    seen = set() if seen is None else seen
    if isinstance(thing, torch.Tensor):
        held = thing.detach()
        value = (type(thing).__name__, tuple(thing.shape), str(thing.dtype), thing.requires_grad)
        grad = None if not thing.is_leaf or thing.grad is None else (id(thing.grad), deep(thing.grad))
        return (*value, id(thing), held.cpu().numpy().tobytes() if held.numel() else b"", grad)
    if isinstance(thing, np.ndarray):
        return ("array", thing.tobytes())
    if id(thing) in seen and not isinstance(thing, (int, float, str, bytes, type(None))):
        return ("seen", id(thing))
    seen.add(id(thing))
    if isinstance(thing, dict):
        return (id(thing), type(thing), [(deep(k, seen), deep(v, seen)) for k, v in thing.items()])
    if isinstance(thing, (list, tuple, collections.deque)):
        return (id(thing), type(thing), [deep(v, seen) for v in thing])
    if isinstance(thing, set):
        return (id(thing), sorted(map(repr, thing)))
    if isinstance(thing, types.FunctionType):
        cells = thing.__closure__ or ()
        return (id(thing), [deep(cell.cell_contents, seen) for cell in cells])
    if isinstance(thing, types.MethodType):
        return (id(thing.__func__), deep(thing.__self__, seen))
    if isinstance(thing, nn.Module) or type(thing).__module__.startswith("test_"):
        return (id(thing), type(thing), deep(vars(thing), seen))
    return thing if isinstance(thing, (int, float, str, bytes, bool, type(None))) else id(thing)


def of_classes(model: nn.Module) -> dict[str, Any]:
    """The attributes of the model's own classes."""
    kinds = {kind for m in model.modules() for kind in type(m).__mro__}
    mine = (kind for kind in kinds if not kind.__module__.startswith(("torch.", "builtins")))
    return {
        f"{kind.__module__}.{kind.__qualname__}": {
            name: deep(value) for name, value in vars(kind).items() if not name.startswith("__")
        }
        for kind in mine
    }


def everything(model: nn.Module, besides: object = None) -> tuple[Any, ...]:
    """All that a call might leave something in: the model, its classes, generators, and `besides`."""
    state = {name: deep(value) for name, value in model.state_dict(keep_vars=True).items()}
    chance = (
        torch.get_rng_state().tolist(),
        random.getstate(),
        [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state(legacy=True)],
    )
    modes = [module.training for module in model.modules()]
    return state, modes, chance, deep(vars(model)), of_classes(model), deep(besides)


def unchanged(model: nn.Module, *calls: Callable[[], object], besides: object = None) -> list[str]:
    """Make the calls, none of which may leave anything behind; what they refuse is returned."""
    refused = []
    for call in calls:
        before = everything(model, besides)
        try:
            call()
        except OcsfastError as error:
            refused.append(str(error))
        ocsfast.detach(model)  # the hooks of a pruner are all that attach adds
        for a, b in zip(before, everything(model, besides), strict=True):
            assert a == b
    return refused


def attach(model: nn.Module, x: Any, ratio: float = 0.3, **options: Any) -> None:
    """Attach a pruner, with an optimizer made for it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ocsfast.attach(model, ratio, optimizer=optimizer, example_inputs=x, **options)
