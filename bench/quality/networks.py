"""The networks that runs start from: thinner ones, ones of given widths, and Torch-Pruning's."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

import ocsfast
from ocsfast import Families
from ocsfast.choice.targets import target_products
from ocsfast.core.errors import ConfigError
from ocsfast.ops.cost import CostModel, build_cost_model
from ocsfast.train.loop import macs_per_sample
from ocsfast.train.models import initialise


def macs_of(families: Families) -> CostModel:
    """MACs of a network by how many groups each family keeps."""
    return build_cost_model(families, *target_products("flops", families, {}))


def uniform_widths(families: Families, budget: int) -> list[int]:
    """One share of every family: how many groups each keeps, so that the budget is just met.

    The largest share that meets it, rounded down; then a group more here and there, the families with
    most rounded away first, as long as the budget allows.

    Args:
        families: of the dense network.
        budget: MACs of one sample at most.
    """
    macs, sizes = macs_of(families), families.sizes
    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        if macs([max(1, int(share * size)) for size in sizes]) <= budget:
            low = share
        else:
            high = share
    kept = [max(1, int(low * size)) for size in sizes]
    lost = sorted(range(len(sizes)), key=lambda f: kept[f] / sizes[f] - low)
    for f in lost:
        more = [n + (k == f) for k, n in enumerate(kept)]
        if more[f] <= sizes[f] and macs(more) <= budget:
            kept = more
    return kept


def with_widths(model: nn.Module, families: Families, kept: Sequence[int]) -> None:
    """Make a network so narrow, and give it new weights as its constructor draws them.

    Args:
        kept: how many groups of each family stay.
    """
    gone = torch.zeros(families.num_groups, dtype=torch.bool)
    for family, count in zip(families.families, kept, strict=True):
        gone[family.first + count : family.first + family.size] = True
    ocsfast.cut_model(model, families, gone)
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    initialise(model)


def torch_pruned(
    model: nn.Module, shape: tuple[int, ...], budget: int, normalizer: str = "mean"
) -> nn.Module:
    """A copy that Torch-Pruning has pruned by its group norm, all layers ranked together.

    Its ratio is of channels, so that the one is searched that just meets the budget.

    Args:
        model: a trained network, on any device.
        budget: MACs of one sample at most.
        normalizer: what a layer's scores are divided by: "mean", or "none".

    Raises:
        ConfigError: no ratio of channels that is tried meets the budget. A layer of which all channels
            rank too low is left whole, so that a larger ratio may take less.
    """
    import torch_pruning as tp

    device = next(model.parameters()).device
    example = torch.zeros(1, *shape, device=device)
    low, high, best = 0.0, 0.98, None
    least = dense = macs_per_sample(model, shape)
    for _ in range(12):
        ratio, pruned = (low + high) / 2, copy.deepcopy(model)
        last = [m for m in pruned.modules() if isinstance(m, nn.Linear)][-1]
        importance = tp.importance.GroupMagnitudeImportance(
            p=2, normalizer=None if normalizer == "none" else normalizer
        )
        pruner = tp.pruner.BasePruner(
            pruned,
            example,
            importance,
            global_pruning=True,
            pruning_ratio=ratio,
            max_pruning_ratio=0.9,
            ignored_layers=[last],
        )
        pruner.step()
        macs = macs_per_sample(pruned, shape)
        least = min(least, macs)
        if macs <= budget:
            high, best = ratio, pruned
        else:
            low = ratio
    if best is None:
        raise ConfigError(f"Torch-Pruning leaves {least / dense:.3f} of the MACs at least, as tried")
    return best
