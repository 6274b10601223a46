"""The processes that train a model: one decision for all, and buckets that fit after the cut."""

from __future__ import annotations

import gc
import hashlib
import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ocsfast.core.errors import StateError
from ocsfast.core.families import Families
from ocsfast.cut.layout import is_sharded
from ocsfast.cut.removal import Copy
from ocsfast.optim import coupled

logger = logging.getLogger("ocsfast")

INSTEAD = (
    "Give ocsfast.step the module inside, and wrap it anew after the cut:\n"
    "    if ocsfast.step(ddp.module, ratio).cut:\n"
    "        ddp = DistributedDataParallel(ddp.module)"
)

T = TypeVar("T")


class Processes(ABC):
    """The processes that train a model together: what a pruner asks of them."""

    @property
    @abstractmethod
    def group(self) -> dist.ProcessGroup | None:
        """Through which they speak; None where there is but one."""

    @property
    def size(self) -> int:
        """How many processes train together."""
        group = self.group
        return 1 if group is None else dist.get_world_size(group)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all, which one of them does: rank 0."""
        group = self.group
        if group is not None:
            return dist.get_rank(group) == 0
        # A model may yet be wrapped: then the default group's ranks are the best guess.
        return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0

    def log(self, text: str, level: int = logging.INFO) -> None:
        """Log on one process of all, as a run has one log to read."""
        if self.is_first:
            logger.log(level, "%s", text)

    def log_lines(self, lines: Iterable[tuple[int, str]]) -> None:
        """The same with several: levels and texts."""
        for level, text in lines:
            self.log(text, level)

    def together(self) -> AbstractContextManager[None]:
        """Around what must fail on every rank if it does on one; nothing where they need not meet."""
        return nullcontext()

    @abstractmethod
    def begin(self, facts: Mapping[str, Any]) -> None:
        """Before a pruner does anything, or goes on from a state; `facts` are what it is made of."""

    def require_copies(self, copies: Sequence[Copy]) -> None:  # noqa: B027  (whole ones all fit)
        """Refuse copies of the model that the cut could not follow.

        Raises:
            StateError: with the reason.
        """

    def bind(
        self,
        families: Families,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        include_bias: bool,
    ) -> coupled.Coupled:
        """As `coupled.bind`, for the weights as they lie in the processes. Must not communicate."""
        return coupled.bind(families, parameters, optimizer, include_bias)

    @abstractmethod
    def require_cuttable(self) -> None:
        """Refuse, before a check, what the cut could not carry on."""

    def rebuild(self) -> None:  # noqa: B027  (nothing, where nothing is built from the parameters)
        """Fit what was built from the parameters to those that the cut left."""

    def require_agreement(self, facts: Mapping[str, Any]) -> None:
        """Compare what the processes are about to decide by.

        Raises:
            StateError: on every process, if one of `facts` differs; it names which and where.
        """
        group = self.group
        if group is None:
            return
        mine = {name: _digest(value) for name, value in facts.items()}
        theirs: list[Any] = [None] * self.size
        dist.all_gather_object(theirs, mine, group=group)
        for name in facts:
            different = [rank for rank, other in enumerate(theirs) if other[name] != theirs[0][name]]
            if different:
                raise StateError(
                    f"the processes have drifted apart: {name} of rank {different[0]} differs from "
                    "rank 0's. Each has to train the same model with the same options, and to call "
                    "ocsfast.step after the same steps"
                )

    def first_of_all(self, value: T) -> T:
        """Rank 0's value, on every rank. It must hold no tensor on an accelerator."""
        group = self.group
        if group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
        return box[0]


class Replicas(Processes):
    """The processes that train copies of a model, if DistributedDataParallel holds it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._wrappers: list[weakref.ref[DistributedDataParallel]] = []

    @property
    def wrappers(self) -> list[DistributedDataParallel]:
        """What wraps the model, or a module that it is part of, at this moment.

        Frameworks wrap a model where nobody sees it, and a wrapper is not known to what it wraps. So it
        is searched for until it is found: never in a process that trains alone.
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
    def group(self) -> dist.ProcessGroup | None:
        wrappers = self.wrappers
        return wrappers[0].process_group if wrappers else None

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Nothing: a model may be wrapped at any time before the first check."""

    def require_cuttable(self) -> None:
        """Refuse, before a check, what the cut could not carry on.

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
        """Give every wrapper buckets for the parameters as they are now, as unpickling one does."""
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


_REBUILD = (
    *("_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper"),
    *("_set_static_graph", "_comm_hooks"),
)


def _digest(value: Any) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()


def processes_of(model: nn.Module) -> Processes:
    """Those that train the model, as it is spread over them."""
    if is_sharded(model):
        from ocsfast.distributed.fsdp import (
            Shards,  # torch's DTensor takes a second to import
        )

        return Shards(model)
    return Replicas(model)
