"""The partition against trying every threshold."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.builders import chain, families
from helpers.tolerance import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ocsfast.core.families import Lookup, Product
from ocsfast.ops import functions as ops
from ocsfast.ops import reference
from ocsfast.ops.cost import CostModel, build_cost_model
from ocsfast.ops.planning import build_plan


def run(
    sizes: list[int],
    scores: Tensor,
    budget: float,
    limits: list[int] | None = None,
    units: list[int] | None = None,
    *,
    tables: int | None = None,
    ties: list[int] | None = None,
    give_back: bool = True,
) -> tuple[list[bool], int, int]:
    """Our answer, once it is the reference's too; budget: the share of the dense cost."""
    device = str(scores.device.type)
    plan, cost = chain(sizes, device, tables=tables)
    highest = torch.tensor(int(budget * cost(sizes)), device=device)
    most = torch.tensor(sizes if limits is None else limits, device=device)
    counts = (None if given is None else torch.tensor(given, device=device) for given in (units, ties))
    arguments = (plan, cost, scores, most, highest, *counts, give_back)
    ours, expected = ops.partition(*arguments), reference.partition(*arguments)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.tolist() == b.tolist()
    mask, reached, status = ours
    return mask.tolist(), int(reached), int(status)


# Few distinct values, so that ties are many; both zeros, both infinities.
values = st.sampled_from([-1.5, -0.0, 0.0, 0.25, 0.5, 1.0, 1e-40, 3e38, float("inf"), float("-inf")])


@dataclass
class Problem:
    """What a partition is asked, and its answer by trying every threshold, as docs/method.md says."""

    sizes: list[int]
    limits: list[int]
    ties: list[int]
    units: list[int]
    tables: int | None
    budget: float
    scores: Tensor

    def __post_init__(self) -> None:
        self.cost = chain(self.sizes, tables=self.tables)[1]
        self.highest = int(self.budget * self.cost(self.sizes))
        self.family = [f for f, size in enumerate(self.sizes) for _ in range(size)]
        self.order = sorted(range(len(self.family)), key=lambda g: (float(self.scores[g]), g))

    def rounded(self, f: int, below: int) -> int:
        """How many groups family f loses where so many lie below the threshold."""
        most = max(0, min(below, self.limits[f], self.sizes[f]))
        return max(n for n in range(most + 1) if n == 0 or (self.sizes[f] - n) % self.units[f] == 0)

    def at(self, threshold: int, held: dict[int, int]) -> list[int]:
        lowest = [self.family[g] for g in self.order[:threshold]]
        tied = [[k for k, first in enumerate(self.ties) if first == t] for t in self.ties]
        return [
            held[t] if t in held else self.rounded(f, max(lowest.count(k) for k in tied[f]))
            for f, t in enumerate(self.ties)
        ]

    def fits(self, gone: list[int]) -> bool:
        return self.cost([n - g for n, g in zip(self.sizes, gone, strict=True)]) <= self.highest

    def answer(self, give_back: bool = True) -> list[int]:
        held: dict[int, int] = {}
        every = range(len(self.order) + 1)
        while True:
            threshold = next((t for t in every if self.fits(self.at(t, held))), len(self.order))
            gone = self.at(threshold, held)
            if threshold == 0 or not give_back or not self.fits(gone):
                return gone
            f = self.family[self.order[threshold - 1]]
            held[self.ties[f]] = gone[f]

    def ours(self, scores: Tensor | None = None, give_back: bool = True) -> tuple[list[int], Tensor]:
        mask, _, status = run(
            self.sizes,
            self.scores if scores is None else scores,
            self.budget,
            self.limits,
            self.units,
            tables=self.tables,
            ties=self.ties,
            give_back=give_back,
        )
        chosen = torch.tensor(mask)
        gone = [int(part.sum()) for part in chosen.split(self.sizes)]
        assert status == (0 if self.fits(gone) else 1)
        return gone, chosen


@st.composite
def problems(draw: st.DrawFn, scores: st.SearchStrategy[float] = values) -> Problem:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    if draw(st.booleans()):  # as many as can be are tied
        sizes = [sizes[0] if draw(st.booleans()) else size for size in sizes]
    ties = [sizes.index(size) if draw(st.booleans()) else f for f, size in enumerate(sizes)]
    ties = [first if ties[first] == first else f for f, first in enumerate(ties)]
    limits = [draw(st.integers(-1, size + 1)) for size in sizes]
    units = [draw(st.integers(1, 5)) for _ in sizes]
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    numbers = draw(st.lists(scores, min_size=sum(sizes), max_size=sum(sizes)))
    return Problem(
        sizes,
        [limits[first] for first in ties],
        ties,
        [units[first] for first in ties],
        draw(st.none() | st.integers(0, 1000)),
        draw(st.floats(0, 1)),
        torch.tensor(numbers, dtype=torch.float64).to(dtype),
    )


@settings(max_examples=100, deadline=None)
@given(problem=problems(), give_back=st.booleans())
def test_the_choice_is_the_best_of_every_threshold(problem: Problem, give_back: bool) -> None:
    assert problem.ours(give_back=give_back)[0] == problem.answer(give_back)


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_no_family_can_lose_a_unit_less(problem: Problem) -> None:
    gone, _ = problem.ours()
    if not problem.fits(gone):
        return
    for first in {t for t, n in zip(problem.ties, gone, strict=True) if n > 0}:
        less = problem.rounded(first, gone[first] - 1)
        back = [less if t == first else n for t, n in zip(problem.ties, gone, strict=True)]
        assert not problem.fits(back)


@settings(max_examples=60, deadline=None)
@given(
    problem=problems(st.sampled_from([0.0, 1e-40, 0.25, 0.5, 1.0, 3e38]) | st.floats(0, 1)),
    factor=st.sampled_from([0.0, 1e-3, 0.5, 0.9, 1.0]),
)
def test_the_choice_stays_as_the_chosen_shrink(problem: Problem, factor: float) -> None:
    _, chosen = problem.ours()
    shrunk = torch.where(chosen, problem.scores * factor, problem.scores)
    assert torch.equal(problem.ours(shrunk)[1], chosen)


def test_what_a_coarse_group_takes_too_much_is_given_back(device: str) -> None:
    """Neurons of low scores go first, then a head that costs more than all of them."""
    found = families([2, 6], {"w": {0: torch.arange(8)}})
    heads, neurons = torch.arange(2), torch.arange(2, 8)
    summands = [Product(50, heads, None, "heads"), Product(5, neurons, None, "neurons")]
    plan = build_plan(found, {"w": torch.zeros(8, device=device)})
    cost = build_cost_model(found, summands, "units").to(torch.device(device))
    scores = torch.tensor([9.0, 8.0, 1, 2, 3, 4, 5, 6], device=device)
    limits = torch.tensor([1, 5], device=device)
    for budget, gone in ((100, [1, 0]), (79, [1, 1]), (80, [1, 0]), (70, [1, 2]), (55, [1, 5])):
        asked = (plan, cost, scores, limits, torch.tensor(budget, device=device))
        mask, reached, status = ops.partition(*asked)
        assert [int(part.sum()) for part in mask.split([2, 6])] == gone
        assert (int(reached), int(status)) == (130 - 50 * gone[0] - 5 * gone[1], 0)
        plain, *_ = ops.partition(*asked, give_back=False)
        assert [int(part.sum()) for part in plain.split([2, 6])] == [1, 5]  # as for budget 55


def test_tied_families_are_given_back_together(device: str) -> None:
    """A threshold falls between their groups, in which both still lose as many."""
    scores = torch.tensor([1.0, 5, 6, 7, 2, 3, 8, 9, 4, 10], device=device)
    for budget in (0.9, 0.7, 0.5, 0.3):
        mask, _, status = run([4, 4, 2], scores, budget, [3, 3, 1], ties=[0, 0, 2])
        gone = [sum(part) for part in (mask[:4], mask[4:8])]
        assert status == 0
        assert gone[0] == gone[1]


def test_the_smallest_pruning_that_reaches_the_budget(device: str) -> None:
    gen = torch.Generator().manual_seed(0)
    scores = torch.rand(60, generator=gen).to(device)
    mask, reached, status = run([10, 20, 30], scores, 0.5)
    plan, cost = chain([10, 20, 30])
    budget = int(0.5 * cost([10, 20, 30]))
    assert status == 0
    assert reached <= budget
    highest = max((g for g in range(60) if mask[g]), key=lambda g: float(scores[g]))
    mask[highest] = False
    kept = [int((~torch.tensor(part)).sum()) for part in (mask[:10], mask[10:30], mask[30:])]
    assert cost(kept) > budget  # one group fewer would not do
    assert plan.count("groups") == 60


def test_ties_go_by_index(device: str) -> None:
    mask, _, _ = run([6], torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0, 0.0], device=device), 0.5)
    assert mask == [True, True, True, False, False, False]


def test_nothing_goes_where_the_budget_is_generous(device: str) -> None:
    mask, reached, status = run([4, 4], torch.arange(8.0, device=device), 1.0)
    assert (any(mask), status) == (False, 0)
    assert reached == chain([4, 4])[1]([4, 4])


def test_unreachable_takes_all_that_the_limits_allow(device: str) -> None:
    mask, _, status = run([4, 4], torch.arange(8.0, device=device), 0.01, [2, 3])
    assert status == 1
    assert mask == [True, True, False, False, True, True, True, False]


def test_nan_prunes_nothing(device: str) -> None:
    mask, reached, status = run([4], torch.tensor([0.0, float("nan"), 1.0, 2.0], device=device), 0.5)
    assert (any(mask), status) == (False, 2)
    assert reached == chain([4])[1]([4])


UNITS = [(1, 6), (2, 6), (4, 8), (8, 8), (10, 10), (16, 10), (2**62, 10), (0, 6), (-(2**63), 6)]


@pytest.mark.parametrize(("unit", "kept"), UNITS)
def test_kept_counts_are_multiples(device: str, unit: int, kept: int) -> None:
    mask, _, _ = run([10], torch.arange(10.0, device=device), 0.0, [4], [unit])
    assert mask.count(False) == kept


def test_each_family_has_a_unit_of_its_own(device: str) -> None:
    mask, _, _ = run([10, 10, 10], torch.arange(30.0, device=device), 0.0, [4, 4, 4], [1, 4, 5])
    assert [part.count(False) for part in (mask[:10], mask[10:20], mask[20:])] == [6, 8, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distinct", [1, 3, 1000])
def test_limits_and_rounding_cut_many_families_short(
    device: str, distinct: int, dtype: torch.dtype
) -> None:
    """More families than a block counts at a time; each has a last group to go, among equal scores."""
    gen = torch.Generator().manual_seed(distinct)
    sizes = torch.randint(1, 12, (21,), generator=gen).tolist()
    scores = torch.randint(distinct, (sum(sizes),), generator=gen).to(device, dtype) * 1e-3 - 0.5
    limits = [int(torch.randint(0, size + 1, (), generator=gen)) for size in sizes]
    for budget in (0.1, 0.4, 0.8):
        run(sizes, scores, budget, limits)
        run(sizes, scores, budget, units=[3] * len(sizes))
        run(sizes, scores, budget, units=[1 + f % 4 for f in range(len(sizes))])
    run(sizes, scores, 0.4, give_back=False)


def test_more_counts_than_shared_memory_has_room_for(device: str) -> None:
    """Axes of which nothing goes, each of another length, beside those of a few families."""
    sizes = [5, 9, 2, 7, 7, 3]
    found = families(sizes, {"w": {0: torch.arange(sum(sizes))}})
    labels = torch.arange(sum(sizes)).split(sizes)
    summands = [Product(3 + f, rows, None, "w") for f, rows in enumerate(labels)]
    summands += [Product(1, torch.full((n,), -1), None, "dense") for n in range(2100)]
    plan = build_plan(found, {"w": torch.zeros(sum(sizes), device=device)})
    cost = build_cost_model(found, summands, "units").to(torch.device(device))
    scores = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(2)).to(device)
    dense, least = cost(sizes), cost([1] * len(sizes))
    ties = torch.tensor([0, 1, 2, 3, 3, 5], device=device)
    for share in (0.2, 0.5, 0.9):
        budget = torch.tensor(int(least + share * (dense - least)), device=device)
        arguments = (plan, cost, scores, torch.tensor(sizes, device=device) - 1, budget, None, ties)
        for a, b in zip(ops.partition(*arguments), reference.partition(*arguments), strict=True):
            assert torch.equal(a, b)


def test_many_groups_are_ranked_at_once(device: str) -> None:
    """Too many for the quadratic reference; every threshold's cost is at hand for one family."""
    gen = torch.Generator().manual_seed(1)
    scores = torch.randn(50_000, generator=gen).to(device)
    plan, cost = chain([50_000], device)
    budget = torch.tensor(cost([20_000]), device=device)
    mask, reached, status = ops.partition(
        plan, cost, scores, torch.tensor([50_000], device=device), budget
    )
    lowest = torch.sort(scores.cpu(), stable=True).indices[:30_000]
    assert torch.equal(torch.nonzero(mask.cpu()).flatten(), lowest.sort().values)
    assert (int(reached), int(status)) == (cost([20_000]), 0)


def test_every_run_gives_the_same_bits(device: str) -> None:
    plan, cost = chain([30, 50], device)
    scores = torch.rand(80, device=device)
    limits, budget = (
        torch.tensor([20, 30], device=device),
        torch.tensor(cost([30, 50]) // 2, device=device),
    )
    units = torch.tensor([4, 4], device=device)
    assert_same_bits(lambda: list(ops.partition(plan, cost, scores, limits, budget, units)))


def test_the_op_passes_opcheck(device: str) -> None:
    plan, cost = chain([5, 6], device)
    arguments = (
        torch.rand(11, device=device),
        plan.tables,
        plan.layout,
        cost.tables,
        cost.layout,
        torch.tensor([3, 3], device=device),
        torch.tensor(100, device=device),
        torch.tensor([1, 2], device=device),
        None,
        True,
    )
    torch.library.opcheck(torch.ops.ocsfast.partition.default, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.zeros(3)}, r"scores has shape \(3\), expected \(8,\)"),
        ({"scores": torch.zeros(8, dtype=torch.float16)}, "scores is Half, expected Float"),
        ({"limits": torch.zeros(3, dtype=torch.int64)}, r"limits has shape \(3\), expected \(2,\)"),
        ({"limits": torch.zeros(2)}, "limits is Float, expected Long"),
        ({"budget": torch.tensor(1.0)}, "budget is Float, expected Long"),
        ({"budget": torch.tensor([1])}, "budget has shape .*, expected a 0-dim tensor"),
        ({"units": torch.tensor([1])}, r"units has shape \(1\), expected \(2,\)"),
        ({"units": torch.tensor([1.0, 1.0])}, "units is Float, expected Long"),
        ({"ties": torch.tensor([0, 0, 0])}, r"ties has shape \(3\), expected \(2,\)"),
        (
            {"ties": torch.tensor([1, 1])},
            r"ties\[0\] is 1, expected 0 or the first family it is tied to",
        ),
        ({"ties": torch.tensor([0, -1])}, r"ties\[1\] is -1, expected 1 or the first"),
        (
            {"ties": torch.tensor([0, 0]), "limits": torch.tensor([3, 2])},
            "ties: families 0 and 1 have 4 and 4 groups and may lose 3 and 2",
        ),
        (
            {"ties": torch.tensor([0, 0]), "units": torch.tensor([1, 2])},
            "ties: families 0 and 1 keep multiples of 1 and 2",
        ),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, object], message: str) -> None:
    plan, cost = chain([4, 4])
    arguments: dict[str, object] = {
        "scores": torch.zeros(8),
        "limits": torch.tensor([3, 3]),
        "budget": torch.tensor(1),
        **changes,
    }
    with pytest.raises(RuntimeError, match=r"ocsfast\.partition: " + message):
        ops.partition(plan, cost, **arguments)  # type: ignore[arg-type]


def test_cost_tables_that_point_outside_are_refused() -> None:
    plan, cost = chain([4, 4], tables=0)
    names = {"entry_family": 99, "term_rows": 99, "term_cols": 99, "lookup_rows": 99, "lookup_cols": -1}
    names |= {"grid_start": 2, "value_start": 1, "grid": 0, "values": -1}
    for table, value in names.items():
        spoilt = CostModel(cost.tables.clone(), cost.layout, cost.unit)
        spoilt.table(table)[0] = value
        with pytest.raises(RuntimeError, match=f"tables: {table}"):
            ops.partition(plan, spoilt, torch.zeros(8), torch.tensor([3, 3]), torch.tensor(1))


@pytest.mark.parametrize(
    ("table", "place", "value", "message"),
    [
        ("grid_start", 1, 0, "lookup 0 has 2 values for grids of 0 and 3"),
        ("grid", 1, 1, "lookup 0 has 2 values for grids of 2 and 1, which do not ascend"),
        ("value_start", 1, 1, "lookup 0 has 1 values for grids of 2 and 1"),
        ("values", 1, 2**53 - 1, "values of all lookups exceed"),
    ],
)
def test_lookups_that_no_table_gives_are_refused(
    table: str, place: int, value: int, message: str
) -> None:
    plan, _ = chain([4])
    rows = torch.arange(4)
    lookups = [Lookup(rows, None, (1, 4), (1,), ((1,), (9,)), name) for name in "ab"]
    cost = build_cost_model(families([4], {}), lookups, "ns")
    cost.table(table)[place] = value
    with pytest.raises(RuntimeError, match=message):
        ops.partition(plan, cost, torch.zeros(4), torch.tensor([3]), torch.tensor(1))
