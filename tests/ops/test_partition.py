"""The partition against trying every threshold."""

from __future__ import annotations

import pytest
import torch
from helpers.builders import chain, families
from helpers.tolerance import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ocsfast.core.families import Lookup
from ocsfast.ops import functions as ops
from ocsfast.ops import reference
from ocsfast.ops.cost import CostModel, build_cost_model


def run(
    sizes: list[int],
    scores: Tensor,
    budget: float,
    limits: list[int] | None = None,
    round_to: int = 1,
    tables: int | None = None,
) -> tuple[list[bool], int, int]:
    """Our answer, once it is the reference's too; budget: the share of the dense cost."""
    plan, cost = chain(sizes, str(scores.device.type), tables=tables)
    highest = torch.tensor(int(budget * cost(sizes)), device=scores.device)
    most = torch.tensor(sizes if limits is None else limits, device=scores.device)
    ours = ops.partition(plan, cost, scores, most, highest, round_to)
    expected = reference.partition(plan, cost, scores, most, highest, round_to)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.tolist() == b.tolist()
    mask, reached, status = ours
    return mask.tolist(), int(reached), int(status)


# Few distinct values, so that ties are many; both zeros, both infinities.
values = st.sampled_from([-1.5, -0.0, 0.0, 0.25, 0.5, 1.0, 1e-40, 3e38, float("inf"), float("-inf")])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_choice_is_the_best_of_every_threshold(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    scores = torch.tensor(
        data.draw(st.lists(values, min_size=sum(sizes), max_size=sum(sizes))), dtype=torch.float64
    ).to(dtype)
    limits = [data.draw(st.integers(-1, size + 1)) for size in sizes]
    tables = data.draw(st.none() | st.integers(0, 1000))
    run(sizes, scores, data.draw(st.floats(0, 1)), limits, data.draw(st.integers(1, 5)), tables)


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


@pytest.mark.parametrize(("round_to", "kept"), [(1, 6), (2, 6), (4, 8), (8, 8), (16, 10)])
def test_kept_counts_are_multiples(device: str, round_to: int, kept: int) -> None:
    mask, _, _ = run([10], torch.arange(10.0, device=device), 0.0, [4], round_to)
    assert mask.count(False) == kept


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
        run(sizes, scores, budget, round_to=3)


def test_more_families_than_shared_memory_has_room_for(device: str) -> None:
    sizes = [1] * 1100
    plan, cost = chain(sizes, device)
    budget = cost(sizes) // 2
    scores = torch.rand(len(sizes), generator=torch.Generator().manual_seed(2)).to(device)
    limits = torch.ones(len(sizes), dtype=torch.int64, device=device)
    mask, reached, status = ops.partition(
        plan, cost, scores, limits, torch.tensor(budget, device=device)
    )
    order = scores.sort(stable=True).indices
    gone = int(mask.sum())
    assert torch.equal(mask.nonzero().flatten(), order[:gone].sort().values)
    assert int(status) == 0
    assert cost((~mask).long()) == int(reached) <= budget
    mask[order[gone - 1]] = False
    assert cost((~mask).long()) > budget


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
    assert_same_bits(lambda: list(ops.partition(plan, cost, scores, limits, budget, 4)))


def test_the_op_passes_opcheck(device: str) -> None:
    plan, cost = chain([5, 6], device)
    arguments = (
        torch.rand(11, device=device),
        plan.tables,
        plan.layout,
        cost.tables,
        cost.layout,
        torch.tensor([3, 3], device=device),
        1,
        torch.tensor(100, device=device),
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
        ({"round_to": 0}, "round_to is 0, expected 1 or more"),
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
        ("values", 1, 2**62 - 1, "values of all lookups exceed"),
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
