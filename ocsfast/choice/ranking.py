"""How scores of unlike groups compare, and which families keep equal numbers of groups."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ocsfast.core.families import Families


class _Placed(NamedTuple):
    """What a ranking needs, on one device."""

    classes: Tensor  # [groups] int64
    order: Tensor  # [groups] int64: group numbers class by class
    counts: Tensor  # [classes] int64: groups of each
    tied: tuple[Tensor, ...]
    worth: Tensor | None


@dataclass(frozen=True, eq=False)
class Ranking:
    """What happens to scores before the partition, and which families it keeps alike.

    normalize: "none" ranks all groups by their score. "kind" divides by the mean score of all groups of
        the same kind (head, neuron, ...), whose raw norms are not alike; "family" by that of its
        family; "geometric" by the root of that, which is the geometric mean of "none" and "family".
        "isomorphic" ranks groups only among families of equal structure, the same layers of repeated
        blocks, so that each such set loses the same share.
    """

    normalize: str
    classes: Tensor  # [groups] int64: groups whose scores compare
    tied: tuple[Tensor, ...]  # each [tied families, groups of a family]: group numbers
    ties: tuple[int, ...]  # by family: the first one that it is tied to, or itself
    worth: Tensor | None = None  # [groups] float32: what a score counts for, or None: all alike
    _placed: dict[torch.device, _Placed] = field(default_factory=dict, init=False)

    def ranked(self, scores: Tensor) -> Tensor:
        """The scores that the partition compares: [groups]."""
        if self.normalize != "none" and scores.numel():
            scores = self._normalized(scores)
        placed = self._on(scores.device)
        if placed.worth is not None:  # dear ones go down in any case
            scores = scores * torch.where(scores < 0, 1 / placed.worth, placed.worth)
        for groups in placed.tied:
            # Equal sorted scores make equal counts fall below any threshold.
            ordered, order = scores[groups].sort(dim=1, stable=True)
            mean = ordered.mean(0).expand_as(ordered)
            scores = scores.index_put((groups.gather(1, order),), mean)
        return scores

    def _on(self, device: torch.device) -> _Placed:
        """What is needed on a device, and kept there: copying would wait for it."""
        if device not in self._placed:
            self._placed[device] = _Placed(
                self.classes.to(device),
                self.classes.argsort(stable=True).to(device),
                self.classes.bincount().to(device),
                tuple(groups.to(device) for groups in self.tied),
                None if self.worth is None else self.worth.to(device),
            )
        return self._placed[device]

    def _normalized(self, scores: Tensor) -> Tensor:
        classes, order, counts, *_ = self._on(scores.device)
        if self.normalize != "isomorphic":
            # Not by index_add: on CUDA it adds up in any order, and ranks of a run would not agree.
            mean = torch.segment_reduce(scores[order], "mean", lengths=counts, unsafe=True)
            if self.normalize == "geometric":
                mean = mean.clamp(min=0).sqrt()
            return scores / torch.where(mean > 0, mean, torch.ones_like(mean))[classes]
        by_score = scores.argsort(stable=True)
        order = by_score[classes[by_score].argsort(stable=True)]  # class by class, ascending
        place = torch.empty_like(order).index_copy_(
            0, order, torch.arange(len(order), device=order.device)
        )
        first = counts.cumsum(0) - counts
        share = (place - first[classes] + 1) / counts[classes].to(scores.dtype)
        return torch.where(scores.isnan(), scores, share)


def make_ranking(families: Families, normalize: str, uniform: bool) -> Ranking:
    """The ranking that two options ask for.

    Args:
        families: of the model.
        normalize: `Config.normalize`.
        uniform: `Config.uniform`: whether families of one kind and size are tied to one kept count.
    """
    if normalize == "isomorphic":
        names = structures(families)
    elif normalize in ("family", "geometric"):
        names = [str(number) for number in range(len(families.families))]
    else:
        names = [family.kind for family in families.families]
    numbers = {name: n for n, name in enumerate(dict.fromkeys(names))}
    classes = torch.tensor([numbers[name] for name in names], dtype=torch.int64)
    alike: dict[object, list[int]] = {}
    for f, family in enumerate(families.families):
        alike.setdefault((family.kind, family.size) if uniform else f, []).append(f)
    first = {f: members[0] for members in alike.values() for f in members}
    groups = [torch.arange(family.first, family.first + family.size) for family in families.families]
    tied = tuple(
        torch.stack([groups[f] for f in members]) for members in alike.values() if len(members) > 1
    )
    ties = tuple(first[f] for f in range(len(groups)))
    return Ranking(normalize, classes[families.family_of_groups()], tied, ties)


def structures(families: Families) -> list[str]:
    """What each family consists of, but for the numbers in its layers' names."""
    member = families.family_of_groups()
    holds: list[set[str]] = [set() for _ in families.families]
    for axis in families.axes:
        place = f"{re.sub(r'[0-9]+', '*', axis.tensor)}[{axis.axis}]"
        for f in torch.unique(member[axis.groups[axis.groups >= 0]]).tolist():
            holds[f].add(place)
    kinds = (family.kind for family in families.families)
    return [f"{kind} {' '.join(sorted(held))}" for kind, held in zip(kinds, holds, strict=True)]
