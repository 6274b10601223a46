"""Families of a model, choices of what goes, and the cost that is predicted for what stays."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helpers.networks import batch
from ocsfast.core.families import Families
from ocsfast.grouping.engines import group
from ocsfast.ops.cost import build_cost_model


def families_of(model: nn.Module) -> Families:
    """The families of a network that takes `helpers.networks.batch`."""
    x, _ = batch(0, next(p.dtype for p in model.parameters()))
    return group(model, (x,), {})


def some(families: Families, seed: int = 0) -> Tensor:
    """A random choice of about 40 % of each family, at least one group."""
    generator = torch.Generator().manual_seed(seed)
    pruned = torch.zeros(families.num_groups, dtype=torch.bool)
    for family in families.families:
        order = torch.randperm(family.size, generator=generator)
        pruned[family.first + order[: max(1, int(0.4 * family.size))]] = True
    return pruned


def portion(families: Families, share: float) -> Tensor:
    """A random choice of that share of each family, of which one group stays at least."""
    pruned = torch.zeros(families.num_groups, dtype=torch.bool)
    for family in families.families:
        count = min(family.size - 1, round(share * family.size))
        pruned[family.first + torch.randperm(family.size)[:count]] = True
    return pruned


def third(families: Families) -> Tensor:
    """A random choice of a third of each family, at least one group."""
    pruned = torch.zeros(families.num_groups, dtype=torch.bool)
    for family in families.families:
        count = max(1, family.size // 3)
        pruned[family.first + torch.randperm(family.size)[:count]] = True
    return pruned


def predicted_macs(families: Families) -> int:
    """The cost of one sample while every group of the families is there."""
    sizes = families.sizes
    return int(build_cost_model(families, families.macs, "MACs")(sizes))
