"""Scores of unlike groups, and families that keep equal numbers."""

from dataclasses import replace

import pytest
import torch
from helpers.builders import families
from torch import nn

from ocsfast.choice.budget import make_aim, worth_of
from ocsfast.choice.ranking import make_ranking
from ocsfast.choice.selection import choose
from ocsfast.core.config import Config
from ocsfast.core.errors import ConfigError
from ocsfast.core.families import Family, Product
from ocsfast.ops import functions as ops
from ocsfast.ops.cost import build_cost_model
from ocsfast.ops.planning import build_plan


def two_blocks(sizes=(6, 6, 4), kinds=("neuron", "neuron", "head")):
    """Two layers of neurons in repeated blocks, and one of heads."""
    names = ("blocks.0.up", "blocks.1.up", "blocks.0.query")
    first, labels = 0, {}
    for name, size in zip(names, sizes, strict=True):
        labels[f"{name}.weight"] = {0: torch.arange(first, first + size)}
        first += size
    products = [Product(10, torch.as_tensor(along[0]), None, name) for name, along in labels.items()]
    found = families(sizes, labels, macs=products)
    named = zip(names, found.families, kinds, strict=True)
    return type(found)(
        tuple(Family(name, f.first, f.size, (name,), kind) for name, f, kind in named),
        *(found.axes, found.attributes, found.macs, found.frozen),
    )


def test_by_kind_each_kind_has_mean_one():
    ranking = make_ranking(two_blocks(), "kind", False)
    scores = torch.cat([torch.rand(12) * 100, torch.rand(4)])
    ranked = ranking.ranked(scores)
    torch.testing.assert_close(ranked[:12].mean(), torch.tensor(1.0))
    torch.testing.assert_close(ranked[12:].mean(), torch.tensor(1.0))
    assert torch.equal(ranked[:12].argsort(), scores[:12].argsort())


def test_by_family_each_family_has_mean_one():
    ranking = make_ranking(two_blocks(), "family", False)
    scores = torch.cat([torch.rand(6) * 100, torch.rand(6), 7 * torch.rand(4)])
    ranked = ranking.ranked(scores)
    for first, last in ((0, 6), (6, 12), (12, 16)):
        torch.testing.assert_close(ranked[first:last], scores[first:last] / scores[first:last].mean())


def test_geometric_is_the_mean_of_none_and_family():
    scores = torch.cat([torch.rand(6) * 100, torch.rand(6), 7 * torch.rand(4)])
    ranked, plain, relative = (
        make_ranking(two_blocks(), name, False).ranked(scores)
        for name in ("geometric", "none", "family")
    )
    torch.testing.assert_close(ranked, (plain * relative).sqrt())
    # A family without a positive mean, as some criteria give, stays as it is.
    scores[:6] = torch.tensor([1.0, -1.0, -2.0, 0.5, 0.5, 0.0])
    torch.testing.assert_close(
        make_ranking(two_blocks(), "geometric", False).ranked(scores)[:6], scores[:6]
    )


def test_isomorphic_ranks_among_like_structures_only():
    ranking = make_ranking(two_blocks(), "isomorphic", False)
    scores = torch.cat([100 + torch.rand(12), torch.rand(4)])
    ranked = ranking.ranked(scores)
    assert sorted(ranked[:12].tolist()) == pytest.approx([k / 12 for k in range(1, 13)])
    assert sorted(ranked[12:].tolist()) == pytest.approx([k / 4 for k in range(1, 5)])
    assert torch.equal(ranked[:12].argsort(), scores[:12].argsort())


@pytest.mark.parametrize("normalize", ["none", "kind", "family", "geometric", "isomorphic"])
def test_nan_is_seen_through(normalize):
    ranking = make_ranking(two_blocks(), normalize, True)
    scores = torch.rand(16)
    scores[3] = float("nan")
    assert bool(ranking.ranked(scores).isnan().any())


@pytest.mark.parametrize("equal", [False, True])
def test_tied_families_lose_equally_many_and_the_lowest(equal):
    found = two_blocks()
    parameters = {axis.tensor: nn.Parameter(torch.randn(len(axis.groups), 3)) for axis in found.axes}
    if equal:  # one score everywhere: any threshold falls between equal scores
        for weight in parameters.values():
            weight.data.fill_(1.0)
    for ratio in (0.1, 0.2, 0.3, 0.45, 0.6):
        config = Config(uniform=True)
        aim = make_aim(found, parameters, config, ratio)
        plan = build_plan(found, parameters)
        bound = ops.Bound(plan, [parameters[name] for name in plan.names])
        choice = choose(aim, bound)
        assert choice.kept[0] == choice.kept[1]
        assert choice.cost == aim.cost_model(choice.kept) <= aim.budget
        norms = parameters["blocks.0.up.weight"].detach().norm(dim=1)
        gone = choice.mask[:6]
        if gone.any() and not equal:
            assert norms[gone].max() < norms[~gone].min()


def test_unknown_normalize():
    with pytest.raises(ConfigError, match="normalize='mean' is not known"):
        Config(normalize="mean")


def test_dear_groups_go_sooner():
    """A head costs 50 and a neuron 5: what is left of the scores is more where two heads go alone."""
    found = families([4, 8], {"w": {0: torch.arange(12)}})
    heads, neurons = torch.arange(4), torch.arange(4, 12)
    summands = [Product(50, heads, None, "heads"), Product(5, neurons, None, "neurons")]
    found = replace(found, macs=tuple(summands))
    # Each row's Eq. 2: heads 1, 2, 3, 4, and neurons 0.05, 0.1, 0.15 and so on.
    weight = torch.cat([torch.arange(1.0, 5), torch.arange(1.0, 9) / 20])[:, None]
    parameters = {"w": nn.Parameter(weight)}
    for cost_aware, kept in ((False, (3, 3)), (True, (2, 8))):
        aim = make_aim(found, parameters, Config(cost_aware=cost_aware), 0.3)
        plan = build_plan(found, parameters)
        choice = choose(aim, ops.Bound(plan, [parameters["w"]]))
        assert choice.kept == kept
        assert choice.cost <= aim.budget == int(0.7 * 240)
    assert worth_of(found, aim.cost_model, aim.limits).tolist() == pytest.approx([0.55] * 4 + [5.5] * 8)


def test_what_costs_nothing_goes_last_and_stays_a_number():
    found = families([4, 4, 1], {"w": {0: torch.arange(9)}})
    cost = build_cost_model(found, (Product(6, torch.arange(4), None, "w"),), "MACs")
    worth = worth_of(found, cost, (3, 3, 0))
    assert worth.tolist() == pytest.approx([1 / 3] * 4 + [1e6] * 5)
    none = build_cost_model(found, (), "MACs")
    assert worth_of(found, none, (3, 3, 0)).tolist() == pytest.approx([1e6] * 9)


def test_dear_groups_go_sooner_by_negative_scores_too():
    found = families([4, 8], {"w": {0: torch.arange(12)}})
    ranking = replace(make_ranking(found, "none", False), worth=torch.tensor([0.5] * 4 + [2.0] * 8))
    scores = ranking.ranked(torch.tensor([-1.0, 1.0, 0.0, 2.0, *[-1.0, 1.0] * 4]))
    assert scores.tolist() == [-2.0, 0.5, 0.0, 1.0, *[-0.5, 2.0] * 4]
