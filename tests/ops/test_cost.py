"""The cost model against sums written out."""

import itertools
import re
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from helpers.builders import families
from helpers.networks import batch, net
from hypothesis import given, settings
from hypothesis import strategies as st

from ocsfast import Config
from ocsfast.choice.budget import make_aim
from ocsfast.choice.targets import parameter_products
from ocsfast.core.errors import ConfigError, GroupingError
from ocsfast.core.families import Lookup, Product
from ocsfast.cut.removal import cut_model
from ocsfast.grouping.engines import group
from ocsfast.ops import functions as ops
from ocsfast.ops.cost import build_cost_model, interpolate
from ocsfast.ops.planning import build_plan


def test_products_over_labelled_axes():
    found = families([3, 2], {})
    rows, cols = torch.tensor([0, 1, 2, -1]), torch.tensor([3, 3, 4, 4, 0, 1, 2])
    products = [Product(10, rows, cols, "a"), Product(7, rows, None, "b"), Product(5, None, None, "c")]
    model = build_cost_model(found, products, "MACs")
    for x, y in itertools.product(range(4), range(3)):
        assert model([x, y]) == 10 * (x + 1) * (2 * y + x) + 7 * (x + 1) + 5
    assert model.unit == "MACs"


def test_large_costs_are_exact():
    found = families([4], {})
    model = build_cost_model(found, [Product(10**15 + 1, torch.arange(4), None, "a")], "MACs")
    assert model([3]) == 3 * 10**15 + 3


def test_unequal_multiplicities_are_refused():
    with pytest.raises(GroupingError, match="layer x: groups of family f0 take unequal numbers"):
        build_cost_model(families([2], {}), [Product(1, torch.tensor([0, 0, 1]), None, "layer x")], "")


def test_parameters_are_counted_as_they_are_after_the_cut():
    model = net()
    found = group(model, (batch(0)[0],), {})
    parameters = dict(model.named_parameters())
    cost = build_cost_model(found, parameter_products(found, parameters), "parameters")
    assert cost([f.size for f in found.families]) == sum(p.numel() for p in parameters.values())
    pruned = torch.zeros(found.num_groups, dtype=torch.bool)
    pruned[::3] = True
    left = cut_model(model, found, pruned)
    assert cost([f.size for f in left.families]) == sum(p.numel() for p in model.parameters())


def by_definition(lookup, rows, cols):
    """Bilinear interpolation in fractions."""

    def weights(grid, count):
        count = min(max(count, grid[0]), grid[-1])
        k = max(n for n, point in enumerate(grid) if point <= count)
        share = Fraction(count - grid[k], grid[k + 1] - grid[k]) if count > grid[k] else Fraction(0)
        return [(k, 1 - share)] + ([(k + 1, share)] if share else [])

    pairs = itertools.product(weights(lookup.row_grid, rows), weights(lookup.col_grid, cols))
    return sum(p * q * lookup.values[i][j] for (i, p), (j, q) in pairs).__floor__()


@st.composite
def measured(draw, most=10**12, count=10**5):
    """A lookup of two families' indices, as large as its numbers may be."""
    points = st.lists(st.integers(1, count), min_size=1, max_size=5, unique=True).map(sorted)
    grids = tuple(draw(points)), tuple(draw(points))
    steps = st.integers(0, most // 25) | st.integers(0, 3)
    share = torch.tensor([[draw(steps) for _ in grids[1]] for _ in grids[0]])
    values = tuple(map(tuple, share.cumsum(0).cumsum(1).tolist()))
    each = draw(st.integers(1, count // 3))  # indices of a group
    rows, cols = torch.arange(3).repeat_interleave(each), torch.arange(3, 5).repeat_interleave(7)
    return Lookup(rows, cols, *grids, values, "layer x")


@settings(max_examples=30, deadline=None)
@given(first=measured(), second=measured(2**53 // 25, 2**20))
def test_lookups_are_interpolated_exactly_and_never_fall(first, second):
    """The cost model, the plain function and the op give the integer of the definition."""
    found = families([3, 2], {"w": {0: torch.arange(5)}})
    plan = build_plan(found, {"w": torch.zeros(5)})
    kept = list(itertools.product(range(4), range(3)))
    for lookup in (first, second):
        model = build_cost_model(found, [lookup, Product(3, None, None, "b")], "ns")
        costs = {pair: model(pair) for pair in kept}
        for (x, y), cost in costs.items():
            at = (x * lookup.rows.numel() // 3, 7 * y)
            assert cost - 3 == by_definition(lookup, *at)
            assert cost - 3 == interpolate(lookup.row_grid, lookup.col_grid, lookup.values, *at)
            assert cost >= max(costs.get((x - 1, y), 0), costs.get((x, y - 1), 0))
            limits = torch.tensor([3 - x, 2 - y])
            _, reached, _ = ops.partition(plan, model, torch.rand(5), limits, torch.tensor(-1))
            assert int(reached) == cost


LOOKUP = Lookup(torch.arange(2), None, (1, 2), (1,), ((4,), (9,)), "layer x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_grid": (2, 1)}, "row_grid=(2, 1), which does not ascend"),
        ({"row_grid": (1, 1)}, "row_grid=(1, 1), which does not ascend"),
        ({"row_grid": ()}, "row_grid=(): integers from 1 to 2**20"),
        ({"row_grid": (0, 2)}, "row_grid=(0, 2): integers from 1 to 2**20"),
        ({"row_grid": (1, 2**20 + 1)}, "row_grid=(1, 1048577): integers from 1 to 2**20"),
        ({"row_grid": (1, 2.0)}, "row_grid=(1, 2.0): integers from 1 to 2**20"),
        ({"col_grid": (2,)}, "col_grid=(2,), but no labels there: (1,) is expected"),
        ({"values": ((4,),)}, "1 rows of [1] values for grids of 2 and 1"),
        ({"values": ((4,), ())}, "2 rows of [0, 1] values for grids of 2 and 1"),
        ({"values": ((4,), (None,))}, "values[1][0]=None: an integer of at least 0"),
        ({"values": ((4.0,), (9,))}, "values[0][0]=4.0: an integer of at least 0"),
        ({"values": ((-1,), (9,))}, "values[0][0]=-1: an integer of at least 0"),
        ({"values": ((4,), (3,))}, "falls from 4 to 3 at values[1][0]"),
        ({"values": ((4,), (2**53 + 1,))}, "sum to 9007199254740993, above 2**53"),
    ],
)
def test_bad_tables_are_refused_by_the_name_of_their_layer(changes, message):
    with pytest.raises(ConfigError, match=f"^layer x: .*{re.escape(message)}"):
        build_cost_model(families([2], {}), [replace(LOOKUP, **changes)], "ns")


def test_columns_may_not_fall_either():
    wide = Lookup(torch.arange(2), torch.arange(2), (1, 2), (1, 2), ((4, 5), (6, 5)), "layer x")
    with pytest.raises(ConfigError, match=r"layer x: .* falls from 6 to 5 at values\[1\]\[1\]"):
        build_cost_model(families([2], {}), [wide], "ns")


def test_lookups_as_a_target():
    """A function that returns both kinds of summands, as `Config.target`."""
    model = net()
    found = group(model, (batch(0)[0],), {})
    rows = found.macs[0].rows
    size = rows.numel()
    lookup = Lookup(rows, None, (1, size), (1,), ((100,), (900,)), "conv")

    def target(families):
        return [lookup, Product(2, rows, None, "norm")]

    aim = make_aim(found, dict(model.named_parameters()), Config(target=target), 0.5)
    assert aim.dense == 900 + 2 * size
    assert aim.budget == aim.dense // 2
