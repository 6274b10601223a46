"""What is to go: the budget, and the partition of the groups that meets it."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ocsfast.choice.ranking import Ranking, make_ranking
from ocsfast.choice.saliency import Criterion, saliency
from ocsfast.core.config import Config, budget_of
from ocsfast.core.errors import ConfigError, StateError
from ocsfast.core.families import Families
from ocsfast.cut.record import Record
from ocsfast.grouping.reasons import one_of, why_dense
from ocsfast.ops import functions as ops
from ocsfast.ops.cost import CostModel, build_cost_model, dense_cost, target_products
from ocsfast.ops.functions import Weights

NAN = 2  # bit of a partition's status; bit 1, unreachable, shows in the cost


@dataclass(frozen=True, eq=False)
class Aim:
    """A ratio of a model's cost, in integers."""

    cost_model: CostModel
    dense: int  # what the ratio is of: the model as it was before any cut
    now: int  # what the model costs as it is: less than that, where it was cut before
    budget: int  # the highest cost that still removes the ratio
    limits: tuple[int, ...]  # most groups each family may lose
    round_to: int  # of which kept counts are multiples
    ranking: Ranking
    _placed: dict[torch.device, tuple[CostModel, Tensor, Tensor]] = field(
        default_factory=dict, init=False
    )

    def on(self, device: torch.device) -> tuple[CostModel, Tensor, Tensor]:
        """Cost model, limits [families] and budget on a device, where they stay: a copy would wait."""
        if device not in self._placed:
            self._placed[device] = (
                self.cost_model.to(device),
                torch.tensor(self.limits, dtype=torch.int64, device=device),
                torch.tensor(self.budget, dtype=torch.int64, device=device),
            )
        return self._placed[device]

    def without(self, families: Container[int]) -> Aim:
        """The same, but nothing of these families may go."""
        limits = tuple(0 if f in families else limit for f, limit in enumerate(self.limits))
        return replace(self, limits=limits)


@dataclass(frozen=True, eq=False)
class Choice:
    """One partition: what a check measures before it decides anything."""

    scores: Tensor  # [groups] by the criterion
    mask: Tensor  # [groups] bool, true where a group goes
    cost: int
    residual: float  # mean Eq. 2 of the pruned groups / of the kept ones
    stability: float | None  # Eq. 3, against the mask of `lag` checks ago
    changed: int  # groups on another side than at the check before
    kept: tuple[int, ...]  # groups that stay, a family


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
        products, unit = tuple(config.target(families)), "cost units"
    else:
        products, unit = target_products(config.target, families, parameters)
    model = build_cost_model(families, products, unit)
    now = model([family.size for family in families.families])
    dense = dense_cost(record, config.target, now)
    limits = tuple(
        min(int(config.max_family_ratio * family.size), max(0, family.size - 1))
        for family in families.families
    )
    ranking = make_ranking(families, config.normalize, config.uniform)
    round_to = math.lcm(config.round_to, families.multiple)
    return Aim(model, dense, now, budget_of(dense, ratio), limits, round_to, ranking)


def choose(
    aim: Aim,
    bound: Weights,
    criterion: Criterion,
    config: Config,
    optimizer: Optimizer,
    before: Sequence[Tensor] = (),
) -> Choice:
    """Scores, the partition and how it compares with those before: launched at once, read at once.

    Args:
        before: the masks of earlier checks, the oldest first, `config.lag` of them at most.

    Raises:
        StateError: a weight is NaN or infinite (the first such is named), or the criterion lacks
            something.
    """
    plan = bound.plan
    cost_model, limits, budget = aim.on(plan.tables.device)
    bound.forget()  # a check is rare, and what it decides is final: it reads the weights themselves
    raw, sizes = saliency(bound, criterion, optimizer)
    scores = aim.ranking.ranked(raw)
    mask, cost, status = ops.partition(plan, cost_model, scores, limits, budget, aim.round_to)
    mask = aim.ranking.evened(mask, scores)
    gone = mask.sum()
    sum_gone = sizes.where(mask, sizes.new_zeros(())).sum(dtype=torch.float64)
    sum_all = sizes.sum(dtype=torch.float64)
    full = len(before) == config.lag
    index = ops.jaccard(plan, before[0], mask) if full else sum_all.new_zeros(())
    changed = (before[-1] != mask).sum() if before else gone.new_zeros(())
    below = torch.cat([gone.new_zeros(1), (~mask).cumsum(0)])
    kept = below[plan.table("family_start").long()].diff()
    # Costs stay below 2**53: exact as doubles. This is the one place that waits for the device.
    facts = [cost, status, gone, sum_gone, sum_all, index, changed]
    read = torch.cat([torch.stack([fact.double() for fact in facts]), kept.double()]).tolist()
    cost_read, status_read, gone_read, of_gone, of_all, index_read, changed_read, *kept_read = read
    if int(status_read) & NAN or not math.isfinite(of_all):
        name = bound.not_finite()
        what = f"{name} holds NaN or infinite values" if name else "the squares of the weights overflow"
        raise StateError(f"{what}: the training has diverged")
    mean_kept = (of_all - of_gone) / max(1.0, mask.numel() - gone_read)
    mean_gone = of_gone / max(1.0, gone_read)
    kept_read = [int(count) for count in kept_read]
    return Choice(
        scores,
        mask,
        aim.cost_model(kept_read) if aim.ranking.tied else int(cost_read),
        mean_gone / mean_kept if mean_kept > 0 else 0.0,
        index_read if full else None,
        int(changed_read),
        tuple(kept_read),
    )


def require_reachable(
    aim: Aim, choice: Choice, families: Families, config: Config, ratio: float
) -> None:
    """Refuse a ratio that the limits do not allow, naming the largest that they do.

    Raises:
        ConfigError: the choice, which is all that may go where the budget is out of reach, is too dear.
    """
    if aim.now <= aim.budget:
        gone = 1 - aim.now / max(1, aim.dense)
        raise ConfigError(
            f"ratio={ratio:g} is reached already: the model was cut before and {gone:.3f} of what it "
            "cost dense is gone. A ratio is of the dense model: a larger one is needed to cut further"
        )
    if choice.cost <= aim.budget:
        return
    most = 1000 * (aim.dense - choice.cost) // max(1, aim.dense) / 1000
    rounding = f", round_to={aim.round_to}" if aim.round_to > 1 else ""
    held, ways = why_dense(families)
    one_each = aim.cost_model([1] * len(families.families))
    raised = ["raise max_family_ratio"] if config.max_family_ratio < 1 and one_each <= aim.budget else []
    raise ConfigError(
        f"ratio={ratio:g} cannot be reached: with max_family_ratio={config.max_family_ratio:g}"
        f"{rounding} at most {most:g} of {quantity(aim.dense)}{aim.cost_model.unit} can go, as {held}. "
        + one_of(["Lower the ratio", *raised, *ways])
    )


def group_shares(aim: Aim, families: Families) -> list[float]:
    """What share of the dense cost goes with one group of each family: how fine one can cut."""
    sizes = [family.size for family in families.families]
    one_less = ([size - (k == f) for k, size in enumerate(sizes)] for f in range(len(sizes)))
    return [(aim.dense - aim.cost_model(left)) / max(1, aim.dense) for left in one_less]


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


def mean_pruned_norm(bound: Weights, mask: Tensor) -> float:
    """Mean L2 norm of the slices of the groups that go; the squares are at hand after a check."""
    _, slice_sq = bound.saliency()
    norms = slice_sq[mask[bound.plan.table("slice_group").long()]].sqrt()
    return float(norms.mean()) if norms.numel() else 0.0


def quantity(value: int) -> str:
    """A count for people, to be followed by its unit: 4089184256 is "4.09 G"."""
    for unit, prefix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {prefix}"
    return f"{value} "
