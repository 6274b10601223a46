"""The cost model against sums written out."""

import itertools

import pytest
import torch
from helpers.builders import families
from helpers.networks import batch, net

from ocsfast.choice.targets import parameter_products
from ocsfast.core.errors import GroupingError
from ocsfast.core.families import Product
from ocsfast.cut.removal import cut_model
from ocsfast.grouping.engines import group
from ocsfast.ops.cost import build_cost_model


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
