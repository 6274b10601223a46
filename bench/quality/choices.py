"""Choices that the library does not offer: what others do, and what tells chance from skill."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ocsfast import Families, Pruner
from ocsfast.choice.budget import Aim, group_shares
from ocsfast.choice.ranking import Ranking
from ocsfast.choice.selection import choose


class Drawn(Ranking):
    """Scores that say nothing of the weights: which groups go was drawn at random."""

    def __init__(self, families: Families, kept: Sequence[int], seed: int) -> None:
        """Draw.

        Args:
            kept: how many groups of each family stay.
        """
        super().__init__("none", families.family_of_groups(), (), tuple(range(len(kept))))
        generator = torch.Generator().manual_seed(seed)
        scores = torch.ones(families.num_groups)
        for family, count in zip(families.families, kept, strict=True):
            order = torch.randperm(family.size, generator=generator) + family.first
            scores[order[: family.size - count]] = 0.0
        object.__setattr__(self, "drawn", scores)

    def ranked(self, scores: Tensor) -> Tensor:
        return self.drawn.to(scores)


class Conventional(Ranking):
    """Scores of the filters alone: Eq. 2 over the rows of the layers that give a group's outputs.

    Not over its norms and what reads it, as the paper's Table 5 calls conventional.
    """

    def __init__(self, families: Families, model: nn.Module) -> None:
        super().__init__("none", families.family_of_groups(), (), tuple(range(len(families.sizes))))
        named = dict(model.named_parameters())
        rows = [
            (named[axis.tensor], axis.groups)
            for axis in families.axes
            if axis.axis == 0 and axis.tensor in named and named[axis.tensor].dim() > 1
        ]
        object.__setattr__(self, "rows", rows)

    @torch.no_grad()
    def ranked(self, scores: Tensor) -> Tensor:
        total, count = torch.zeros_like(scores), torch.zeros_like(scores)
        for weight, groups in self.rows:
            rms = weight.flatten(1).square().mean(1).sqrt()
            has = groups >= 0
            at = groups[has].to(scores.device)
            total.index_add_(0, at, rms[has.to(rms.device)].to(scores.dtype))
            count.index_add_(0, at, torch.ones_like(at, dtype=scores.dtype))
        return total / count.clamp(min=1)


def initial(pruner: Pruner) -> Aim:
    """Scores relative to the mean of their family's as the weights are now."""
    aim, families = pruner._parts.aim, pruner.families
    bound, criterion = pruner._parts.hooks.coupled.bound, pruner.config.criterion
    scores = choose(aim, bound, criterion, pruner.optimizer).scores
    at = families.family_of_groups().to(scores.device)
    mean = torch.zeros(len(families.sizes), device=scores.device).index_add(0, at, scores)
    mean /= torch.tensor(families.sizes, device=scores.device)
    return with_worth(aim, 1 / mean[at])


def conventional(pruner: Pruner) -> Aim:
    """Scores of the filters alone."""
    ranking = Conventional(pruner.families, pruner._parts.alive())
    return dataclasses.replace(pruner._parts.aim, ranking=ranking)


def softmax(pruner: Pruner) -> Aim:
    """Scores times one minus a softmax of the MMACs a group, as the authors' code weighs them."""
    aim, families = pruner._parts.aim, pruner.families
    shares = torch.tensor(group_shares(aim, families), dtype=torch.float64)
    weights = 1 - (shares * aim.dense / 1e6).softmax(0)
    return with_worth(aim, weights[families.family_of_groups()].float())


def with_worth(aim: Aim, worth: Tensor) -> Aim:
    ranking = dataclasses.replace(aim.ranking, worth=worth)
    return dataclasses.replace(aim, ranking=ranking)


CHOICES: dict[str, Callable[[Pruner], Aim]] = {
    "initial": initial,
    "conventional": conventional,
    "softmax": softmax,
}
