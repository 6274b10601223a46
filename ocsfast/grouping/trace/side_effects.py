"""Side effects of running a model, taken back: afterwards the model is as the user left it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ocsfast.core.errors import GroupingError
from ocsfast.grouping.trace.snapshot import Snapshot
from ocsfast.grouping.trace.stand_ins import stand_in


@contextmanager
def as_it_was(model: nn.Module, *, weights: bool = False) -> Iterator[Snapshot]:
    """Put the model and all generators of random numbers back as they were, also after an error.

    That covers whatever the forward pass can reach by Python references from the model: attributes,
    containers, classes, what hooks write to, buffers, gradients, modes.

    Args:
        model: what is run inside the `with` block.
        weights: whether the parameters' numbers may change as well.
    """
    snapshot = Snapshot(model, weights=weights)
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    python_state = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(devices=[] if on_cpu else None):
        try:
            yield snapshot
        finally:
            snapshot.restore()
            random.setstate(python_state)
            if numpy_state is not None:
                numpy.random.set_state(numpy_state)


@contextmanager
def undisturbed(model: nn.Module, *, training: bool, real: bool = False) -> Iterator[Snapshot]:
    """Put the model in a mode and, at the end, back as it was (see `as_it_was`).

    Inside, a language model keeps no cache of keys and values: `config.use_cache` is False. Functions
    behind `functools.cache` compute their results anew, and some parts run as `stand_in` says, also in
    copies that are made here.

    Args:
        model: what is run inside the `with` block.
        training: the mode.
        real: whether the model runs on numbers and may change its weights; False: it is only traced.
    """
    with as_it_was(model, weights=real or changes_modes(model)) as snapshot:
        try:
            model.train(training)
        except NotImplementedError as error:  # the module of an exported program has one mode
            raise GroupingError(f"the model has one mode only ({error}): pass its source") from error
        held = (vars(module).get("config") for module in model.modules())
        configs: list[Any] = [config for config in held if getattr(config, "use_cache", False)]
        for config in configs:
            config.use_cache = False
        stand_in(model)
        snapshot.bypass_caches()
        yield snapshot


def own_inputs(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with copies of their tensors, for one pass that may write to them."""

    def copy_of(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_(x.requires_grad)

    args, kwargs = pytree.tree_map_only(Tensor, copy_of, (args, kwargs))
    return tuple(args), kwargs


def changes_modes(model: nn.Module) -> bool:
    """Whether a class of the model overrides `train` or `eval`: adapters change weights there."""
    kinds = {type(module) for module in model.modules()}
    return any(k.train is not nn.Module.train or k.eval is not nn.Module.eval for k in kinds)
