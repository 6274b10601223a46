"""The budget: what a ratio of a model's cost means, and whether it can be reached (Eq. 1).

The costs themselves ("flops", "params", ...) are in `targets`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from ocsfast.choice.ranking import Ranking, make_ranking
from ocsfast.choice.targets import dense_cost, target_products
from ocsfast.core.config import LATENCY, UNITS, Config
from ocsfast.core.errors import ConfigError
from ocsfast.core.families import Families
from ocsfast.cut.record import Record
from ocsfast.grouping.reasons import one_of, why_dense
from ocsfast.ops.cost import CostModel, build_cost_model


@dataclass(frozen=True, eq=False)
class Placed:
    """What the partition reads of an aim, on a device."""

    cost_model: CostModel
    limits: Tensor  # [families] int64
    budget: Tensor  # 0-dim int64
    ties: Tensor | None  # [families] int64: `Ranking.ties`, where families are tied


@dataclass(frozen=True, eq=False)
class Aim:
    """A ratio of a model's cost, in integers."""

    cost_model: CostModel
    dense: int  # what the ratio is of: the model as it was before any cut
    now: int  # the model's cost now; below `dense` if it was cut before
    budget: int  # the highest cost that still removes the ratio
    limits: tuple[int, ...]  # most groups each family may lose
    round_to: int  # of which kept counts are multiples
    ranking: Ranking
    give_back: bool  # whether what the threshold took beyond the budget stays where it can
    _placed: dict[torch.device, Placed] = field(default_factory=dict, init=False)
    _without: dict[frozenset[int], Aim] = field(default_factory=dict, init=False)

    def on(self, device: torch.device) -> Placed:
        """What the partition reads, on a device; kept there, as copying would wait."""
        if device not in self._placed:
            ties = self.ranking.ties if self.ranking.tied else None
            self._placed[device] = Placed(
                self.cost_model.to(device),
                torch.tensor(self.limits, dtype=torch.int64, device=device),
                torch.tensor(self.budget, dtype=torch.int64, device=device),
                None if ties is None else torch.tensor(ties, dtype=torch.int64, device=device),
            )
        return self._placed[device]

    def without(self, families: frozenset[int]) -> Aim:
        """The same, but nothing of these families may go; kept too, with what it has on a device.

        Tied families go along: they lose equally many groups, which is none.
        """
        if families not in self._without:
            ties = self.ranking.ties
            held = {ties[f] for f in families}
            limits = tuple(
                0 if first in held else limit for first, limit in zip(ties, self.limits, strict=True)
            )
            self._without[families] = replace(self, limits=limits)
        return self._without[families]


def make_aim(
    families: Families,
    parameters: Mapping[str, nn.Parameter],
    config: Config,
    ratio: float,
    record: Record | None = None,
) -> Aim:
    """The cost model of `config.target`, and what `ratio` of it means (Eq. 1).

    Args:
        record: of the cut that the model has behind it: then the ratio is of what it cost before.
    """
    if callable(config.target):
        model = build_cost_model(families, tuple(config.target(families)), "cost units")
    else:
        model = build_cost_model(families, *target_products(config.target, families, parameters))
    now = model(families.sizes)
    dense = dense_cost(record, config.target, now, families)
    limits = tuple(
        min(int(config.max_family_ratio * family.size), max(0, family.size - 1))
        for family in families.families
    )
    ranking = make_ranking(families, config.normalize, config.uniform)
    round_to = math.lcm(config.round_to, families.multiple)
    budget = budget_of(dense, ratio)
    return Aim(model, dense, now, budget, limits, round_to, ranking, config.give_back)


def budget_of(dense_cost: int, ratio: float) -> int:
    """Largest cost that still removes `ratio`: floor((1 - ratio) * dense_cost), ratio taken as written.

    A binary 0.7 is a little less than 7/10; the decimal that the user wrote is what counts (Eq. 1).
    """
    return math.floor((1 - Fraction(repr(ratio))) * dense_cost)


def require_reachable(aim: Aim, cost: int, families: Families, config: Config, ratio: float) -> None:
    """Refuse a ratio that the limits do not allow, naming the largest that they do.

    Args:
        cost: of the partition for this aim: where the budget cannot be reached, of all that may go.

    Raises:
        ConfigError: that cost is above the budget, or the model is below it already.
    """
    if aim.now <= aim.budget:
        gone = 1 - aim.now / max(1, aim.dense)
        raise ConfigError(
            f"ratio={ratio:g} is reached already: the model was cut before and {gone:.3f} of what it "
            "cost dense is gone. A ratio is of the dense model: a larger one is needed to cut further"
        )
    if cost <= aim.budget:
        return
    most = 1000 * (aim.dense - cost) // max(1, aim.dense) / 1000
    rounding = f", round_to={aim.round_to}" if aim.round_to > 1 else ""
    held, ways = why_dense(families)
    one_each = aim.cost_model([1] * len(families.families))
    raised = ["raise max_family_ratio"] if config.max_family_ratio < 1 and one_each <= aim.budget else []
    raise ConfigError(
        f"ratio={ratio:g} cannot be reached: with max_family_ratio={config.max_family_ratio:g}"
        f"{rounding} at most {most:g} of {quantity(aim.dense, aim.cost_model.unit)} can go, as {held}. "
        + one_of(["Lower the ratio", *raised, *ways])
    )


def group_shares(aim: Aim, families: Families) -> list[float]:
    """What share of the dense cost goes with one group of each family: how fine one can cut."""
    sizes = families.sizes
    one_less = ([size - (k == f) for k, size in enumerate(sizes)] for f in range(len(sizes)))
    return [(aim.now - aim.cost_model(left)) / max(1, aim.dense) for left in one_less]


def overshoot(aim: Aim, cost: int) -> float:
    """By what share of the dense cost a choice lies below the budget."""
    return max(0, aim.budget - cost) / max(1, aim.dense)


def coarsest(aim: Aim, families: Families) -> str:
    """The family whose groups cost most, and how to have finer ones."""
    share, family = max(
        zip(group_shares(aim, families), families.families, strict=True), key=lambda pair: pair[0]
    )
    count, ways = len(family.layers), []
    if count > 1:
        ways.append("ocsfast.as_graph(model, x)")  # which frees what the model's code ties
    if count > 1 and family.kind == "head":
        ways.append("a head count of its own in each layer")
    if aim.ranking.tied:
        ways.append("uniform=False")
    if aim.round_to > 1:
        ways.append("a smaller round_to")
    return (
        f"one group of {family.name} (a {family.kind} in {count} layer{'s' if count > 1 else ''}) is "
        f"{100 * share:.1f} % of the dense cost"
        + (f". It may be finer with {one_of(ways)}" if ways else "")
    )


def quantity(value: int, unit: str) -> str:
    """A cost for people: 4089184256 MACs are "4.09 GMACs", 12300000 nanoseconds "12.3 ms"."""
    if unit == UNITS[LATENCY]:
        return f"{value / 10**6:.3g} ms"
    for size, prefix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value} {unit}"
