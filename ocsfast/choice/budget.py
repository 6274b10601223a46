"""The budget: what a ratio of a model's cost means, and whether it can be reached (Eq. 1).

The costs themselves ("flops", "params", ...) are in `targets`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from ocsfast.choice.ranking import Ranking, make_ranking
from ocsfast.choice.targets import dense_cost, target_products
from ocsfast.choice.units import multiple_for, units_of
from ocsfast.core.config import LATENCY, UNITS, Config
from ocsfast.core.errors import ConfigError
from ocsfast.core.families import Families
from ocsfast.cut.record import Record
from ocsfast.grouping.reasons import one_of, why_dense
from ocsfast.ops.cost import CostModel, build_cost_model

# Of the dense cost: a choice that takes so much more than asked for is worth a word.
MUCH = 0.02
# Of the mean price: what costs nothing goes last, but its scores stay numbers.
_LEAST_PRICE = 1e-6


@dataclass(frozen=True, eq=False)
class Placed:
    """What the partition reads of an aim, on a device."""

    cost_model: CostModel
    limits: Tensor  # [families] int64
    budget: Tensor  # 0-dim int64
    units: Tensor | None  # [families] int64: `Aim.units`, where any is more than 1
    ties: Tensor | None  # [families] int64: `Ranking.ties`, where families are tied


@dataclass(frozen=True, eq=False)
class Aim:
    """A ratio of a model's cost, in integers."""

    cost_model: CostModel
    dense: int  # what the ratio is of: the model as it was before any cut
    now: int  # the model's cost now; below `dense` if it was cut before
    budget: int  # the highest cost that still removes the ratio
    limits: tuple[int, ...]  # most groups each family may lose
    multiple: int  # that kept counts are to have: of `Config.round_to`
    units: tuple[int, ...]  # of each family, what its kept count is a multiple of
    ranking: Ranking
    give_back: bool  # whether what the threshold took beyond the budget stays where it can
    _placed: dict[torch.device, Placed] = field(default_factory=dict, init=False)
    _without: dict[frozenset[int], Aim] = field(default_factory=dict, init=False)

    def on(self, device: torch.device) -> Placed:
        """What the partition reads, on a device; kept there, as copying would wait."""
        if device not in self._placed:

            def counts(values: Sequence[int]) -> Tensor:
                return torch.tensor(values, dtype=torch.int64, device=device)

            self._placed[device] = Placed(
                self.cost_model.to(device),
                counts(self.limits),
                torch.tensor(self.budget, dtype=torch.int64, device=device),
                counts(self.units) if max(self.units, default=1) > 1 else None,
                counts(self.ranking.ties) if self.ranking.tied else None,
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
    if config.cost_aware:
        ranking = replace(ranking, worth=worth_of(families, model, limits))
    device = next((parameter.device for parameter in parameters.values()), torch.device("cpu"))
    multiple = multiple_for(config.round_to, device)
    budget = budget_of(dense, ratio)
    aim = Aim(model, dense, now, budget, limits, 1, (1,) * len(limits), ranking, config.give_back)
    return with_multiple(aim, families, parameters, config.round_to, multiple)


def with_cost_model(
    aim: Aim, families: Families, cost_model: CostModel, dense: int, ratio: float
) -> Aim:
    """The same ratio of another cost, which was `dense` before any cut."""
    ranking, now = aim.ranking, cost_model(families.sizes)
    if ranking.worth is not None:
        ranking = replace(ranking, worth=worth_of(families, cost_model, aim.limits))
    budget = budget_of(dense, ratio)
    return replace(aim, cost_model=cost_model, dense=dense, now=now, budget=budget, ranking=ranking)


def worth_of(families: Families, cost_model: CostModel, limits: Sequence[int]) -> Tensor:
    """What each group's score counts for where dear groups go sooner: [groups] float32.

    One over what a group costs, on average over as many as may go, while all other families are whole;
    relative to the mean family. So that the budget is met at the least loss of what scores sum to, as a
    knapsack is filled by worth a weight (HALP, arXiv 2110.10811).
    """
    sizes = families.sizes
    left = ([s - n * (k == f) for k, s in enumerate(sizes)] for f, n in enumerate(limits))
    saved = [
        (cost_model(sizes) - cost_model(kept)) / max(1, n) for kept, n in zip(left, limits, strict=True)
    ]
    price = torch.tensor(saved, dtype=torch.float64)
    mean = price.mean() if price.numel() and price.mean() > 0 else torch.ones(())
    relative = (price / mean).clamp(min=_LEAST_PRICE)
    return (1 / relative)[families.family_of_groups()].float()


def with_multiple(
    aim: Aim, families: Families, parameters: Mapping[str, Tensor], round_to: int | str, multiple: int
) -> Aim:
    """The same, but kept counts are to have another multiple; arguments as of `units_of`."""
    units = units_of(families, parameters, round_to, multiple, aim.ranking.ties)
    return replace(aim, multiple=multiple, units=units)


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
    unit = max(aim.units, default=1)
    rounding = f" and kept counts in multiples of {unit}" if unit > 1 else ""
    held, ways = why_dense(families)
    one_each = aim.cost_model([1] * len(families.families))
    raised = ["raise max_family_ratio"] if config.max_family_ratio < 1 and one_each <= aim.budget else []
    if config.round_to not in ("auto", 1):
        raised.append("lower round_to")
    raise ConfigError(
        f"ratio={ratio:g} cannot be reached: with max_family_ratio={config.max_family_ratio:g}"
        f"{rounding} at most {most:g} of {quantity(aim.dense, aim.cost_model.unit)} can go, as {held}. "
        + one_of(["Lower the ratio", *raised, *ways])
    )


def group_shares(aim: Aim, families: Families, counts: Sequence[int] | None = None) -> list[float]:
    """What share of the dense cost goes with one group of each family, or with so many."""
    sizes, counts = families.sizes, [1] * len(families.sizes) if counts is None else counts
    less = ([max(0, s - n * (k == f)) for k, s in enumerate(sizes)] for f, n in enumerate(counts))
    return [(aim.now - aim.cost_model(left)) / max(1, aim.dense) for left in less]


def overshoot(aim: Aim, cost: int) -> float:
    """By what share of the dense cost a choice lies below the budget."""
    return max(0, aim.budget - cost) / max(1, aim.dense)


def coarsest(aim: Aim, families: Families) -> str:
    """The family whose unit costs most, and how to have finer ones."""
    steps = zip(group_shares(aim, families, aim.units), aim.units, families.families, strict=True)
    share, unit, family = max(steps, key=lambda step: step[0])
    count, ways = len(family.layers), []
    if count > 1:
        ways.append("ocsfast.as_graph(model, x)")  # which frees what the model's code ties
    if count > 1 and family.kind == "head":
        ways.append("a head count of its own in each layer")
    if aim.ranking.tied:
        ways.append("uniform=False")
    if unit > families.multiple:
        ways.append("a smaller round_to")
    return (
        f"{'one group' if unit == 1 else f'{unit} groups at a time'} of {family.name} "
        f"(a {family.kind} in {count} layer{'s' if count > 1 else ''}) "
        f"{'is' if unit == 1 else 'are'} {100 * share:.1f} % of the dense cost"
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
