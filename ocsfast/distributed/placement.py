"""Where a model's parameters are placed, sharded or whole, and so which processes train it."""

from __future__ import annotations

from torch import nn

from ocsfast.cut.layout import is_sharded
from ocsfast.distributed.ddp import Replicas
from ocsfast.distributed.processes import Processes


def processes_of(model: nn.Module) -> Processes:
    """The processes that train a model: those that hold its shards, or else a copy of it each.

    Raises:
        StateError: the model is sharded in a way that cannot be pruned.
    """
    if is_sharded(model):
        # torch's DTensor takes a second to import.
        from ocsfast.distributed.fsdp import Shards

        return Shards(model)
    return Replicas(model)
