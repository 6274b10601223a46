"""The small network sharded over the ranks by fully_shard, and its values as whole tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as of_parts
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import ocsfast
from helpers.networks import EPOCH, batch
from helpers.ranks import EPOCHS, RANKS, smooth
from ocsfast import Pruner
from ocsfast.core.families import Families

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3),
}


def options() -> dict[str, Any]:
    """What `attach` is told: the run's length, and to step as sharded weights do."""
    return {"total_steps": EPOCHS * EPOCH, "one_pass": False}


@functools.cache
def structure() -> Families:
    """The families of the network, which have to be known before it is sharded."""
    return ocsfast.group(smooth(), batch(0)[0])


def sharded(seed: int = 0) -> tuple[nn.Module, Families]:
    """Two units and what is left: the root keeps its parameters gathered after a forward pass."""
    model, families = smooth(seed), structure()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (model.conv2, model.fc1):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, families


def attached(kind: str, seed: int = 0) -> tuple[nn.Module, Optimizer, Pruner]:
    """A sharded network, the optimizer of that kind, and its pruner."""
    model, families = sharded(seed)
    optimizer = OPTIMIZERS[kind](model.parameters())
    pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, families=families, **options())
    return model, optimizer, pruner


def states(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state dicts of both, as torch.distributed.checkpoint takes them."""
    return {
        "model": of_parts.get_model_state_dict(model),
        "optimizer": of_parts.get_optimizer_state_dict(model, optimizer),
    }


def values(model: nn.Module, optimizer: Optimizer) -> Any:
    """Weights and optimizer state, each tensor whole."""

    def whole(state: Any) -> Any:
        if isinstance(state, dict):
            return {key: whole(value) for key, value in state.items()}
        return state.full_tensor() if isinstance(state, DTensor) else state

    parts = states(model, optimizer)
    return whole({"model": dict(parts["model"]), "state": parts["optimizer"]["state"]})
