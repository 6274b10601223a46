"""Models in DistributedDataParallel: every process trains a copy, and gradients are averaged.

What goes is decided once for all of them, in `decision`.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ocsfast.core.errors import StateError
from ocsfast.distributed.processes import Processes

INSTEAD = (
    "Give ocsfast.step the module inside, and wrap it anew after the cut:\n"
    "    if ocsfast.step(ddp.module, ratio).cut:\n"
    "        ddp = DistributedDataParallel(ddp.module)"
)

# Private parts of DistributedDataParallel that new buckets need.
_REBUILD = (
    *("_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper"),
    *("_set_static_graph", "_comm_hooks"),
)


class Replicas(Processes):
    """The processes that each train a copy of a model; only this one, if nothing wraps the model."""

    def __init__(self, model: nn.Module) -> None:
        """Nothing is searched for yet."""
        self._model = weakref.ref(model)
        self._wrappers: list[weakref.ref[DistributedDataParallel]] = []

    @property
    def wrappers(self) -> list[DistributedDataParallel]:
        """The wrappers of the model, or of a module that it is part of, at this moment.

        A model does not know what wraps it, and frameworks wrap it out of the user's sight. So all
        objects of the process are searched until a wrapper is found, which takes a while. In a process
        that trains alone nothing is searched.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return []
        found = [w for w in (reference() for reference in self._wrappers) if w is not None]
        if not found:
            model = self._model()
            found = [
                thing
                for thing in gc.get_objects()
                if issubclass(type(thing), DistributedDataParallel)
                and any(module is model for module in thing.module.modules())
            ]
            self._wrappers = [weakref.ref(wrapper) for wrapper in found]
        return found

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        wrappers = self.wrappers
        return wrappers[0].process_group if wrappers else None

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Do nothing: the model may be wrapped at any time before the first check."""

    def require_cuttable(self) -> None:
        """Refuse, before a check, to go on where the cut could not follow.

        Raises:
            StateError: a wrapper is inside `no_sync`, or of a kind that cannot be given new buckets.
        """
        for wrapper in self.wrappers:
            if not wrapper.require_backward_grad_sync:
                raise StateError(
                    "ocsfast.step was called inside no_sync(): call it after optimizer.step()"
                )
            rebuilds = all(hasattr(wrapper, name) for name in _REBUILD)
            if not rebuilds or wrapper.mixed_precision is not None:
                raise StateError(f"this DistributedDataParallel cannot follow a cut. {INSTEAD}")

    def rebuild(self) -> None:
        """Give every wrapper gradient buckets for the parameters as they are now.

        This is what DistributedDataParallel does when it is unpickled.
        """
        for wrapper in self.wrappers:
            hooks = list(wrapper._comm_hooks)
            parameters, sparse = wrapper._build_params_for_reducer()  # type: ignore[no-untyped-call]
            names = wrapper._build_debug_param_to_name_mapping(parameters)  # type: ignore[no-untyped-call]
            wrapper._ddp_init_helper(  # type: ignore[no-untyped-call]
                parameters, sparse, names, wrapper.static_graph
            )
            if wrapper.static_graph:
                wrapper._set_static_graph()  # type: ignore[no-untyped-call]
            wrapper._has_rebuilt_buckets = False
            wrapper._comm_hooks = []
            for hook, state in hooks:
                wrapper.register_comm_hook(state, hook)
