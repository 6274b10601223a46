"""Layers that are frozen in mid-run (`requires_grad_(False)`): what they take part in stays as it is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from operator import attrgetter

import torch
from torch import Tensor, nn

from ocsfast.choice.ranking import Ranking
from ocsfast.core.families import Families, Frozen

_TRAINS = attrgetter("requires_grad")
REASON = "requires_grad=False"


class Freezing:
    """Which families hold a frozen parameter, now.

    A frozen parameter keeps its shape and its bits, so that no group of a family on any of its axes may
    go; nor of families that keep equally many groups as those.
    """

    def __init__(
        self, families: Families, parameters: Mapping[str, nn.Parameter], ranking: Ranking
    ) -> None:
        self._families = families
        member = families.family_of_groups()
        on: dict[str, set[int]] = {}
        for axis in families.axes:
            if axis.tensor in parameters:
                held = torch.unique(member[axis.groups[axis.groups >= 0]]).tolist()
                on.setdefault(axis.tensor, set()).update(held)
        tied = [set(member[groups[:, 0]].tolist()) for groups in ranking.tied]
        self._on = [held.union(*(others for others in tied if others & held)) for held in on.values()]
        self._watched = [parameters[name] for name in on]
        self._trains = [True] * len(self._watched)
        self.families: frozenset[int] = frozenset()  # those that are held, as `look` last found
        self._told: frozenset[int] = frozenset()
        # Frozen from the start: grouping left them dense.
        self._dense = [p for p in parameters.values() if not p.requires_grad]

    def look(self) -> bool:
        """Read every flag, some microseconds: whether other parameters are frozen than before."""
        trains = list(map(_TRAINS, self._watched))
        if trains == self._trains:
            return False
        self._trains = trains
        held = (on for on, free in zip(self._on, trains, strict=True) if not free)
        self.families = frozenset().union(*held)
        return True

    def without_held(self, mask: Tensor) -> Tensor:
        """A choice ([groups] bool) less the groups that are held."""
        held = torch.zeros_like(mask)
        for f in self.families:
            family = self._families.families[f]
            held[family.first : family.first + family.size] = True
        return mask & ~held

    def named(self) -> tuple[Frozen, ...]:
        """The held families, for a report."""
        return tuple(Frozen(self._families.families[f].name, REASON) for f in sorted(self.families))

    def told(self, reachable: bool, ratio: float) -> list[tuple[int, str]]:
        """What has changed since this was last called, for the log: levels and texts.

        Args:
            reachable: whether `ratio` can be reached without the families that are held.
        """
        said = []
        thawed = sum(map(_TRAINS, self._dense))
        if thawed:
            self._dense = [p for p in self._dense if not p.requires_grad]
            text = (
                f"{thawed} parameters that were frozen when pruning began train now, and stay dense: to "
                "let them shrink, call ocsfast.detach(model) and begin anew"
            )
            said.append((logging.WARNING, text))
        if self.families != self._told:
            self._told = self.families
            said.append(self._held(reachable, ratio))
        return said

    def _held(self, reachable: bool, ratio: float) -> tuple[int, str]:
        names = [self._families.families[f].name for f in sorted(self.families)]
        if not names:
            return logging.INFO, "nothing is frozen any more: all that might go before may go again"
        few = f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        text = f"frozen (requires_grad=False), so it stays as it is from now on: {few}"
        if reachable:
            return logging.INFO, text
        return logging.WARNING, (
            f"{text}. ratio={ratio:g} cannot be reached without it: unfreeze it before the deadline, or "
            "less will go"
        )
