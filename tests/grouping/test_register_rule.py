"""A user's own operator: dense without a rule, pruned with one."""

import pytest
import torch
from torch import nn

import ocsfast
from ocsfast.grouping.engines import group
from ocsfast.grouping.rules.registry import RULES

NAME = "ocsfast_tests::doubled"


@torch.library.custom_op(NAME, mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


doubled.register_fake(torch.empty_like)


@torch.library.custom_op("ocsfast_tests::add", mutates_args=())
def add(x: torch.Tensor, n: int) -> torch.Tensor:
    return torch.cat([x[:, n:], x[:, :n]], 1)


add.register_fake(lambda x, n: torch.empty_like(x))


class Net(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.first, self.second, self.op = nn.Linear(4, 6), nn.Linear(6, 2), op

    def forward(self, x):
        return self.second(self.op(self.first(x)))


@pytest.fixture
def clean():
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def test_with_and_without_a_rule(clean):
    x = torch.randn(2, 4)
    families = group(Net(lambda x: doubled(x)), (x,))
    assert families.families == ()
    assert f"no rule for {NAME}" in families.frozen[0].reason

    @ocsfast.register_rule(NAME)
    def same(walk, node, args):
        return walk.dims(args["x"])

    assert [f.name for f in group(Net(lambda x: doubled(x)), (x,)).families] == ["first"]


def test_a_wrong_rule_is_found_out(clean):
    @ocsfast.register_rule("ocsfast_tests::add")
    def wrong(walk, node, args):
        return walk.dims(args["x"])

    families = group(Net(lambda x: add(x, 1)), (torch.randn(2, 4),))
    assert families.families == ()
    assert "cutting it fails" in families.frozen[-1].reason


def test_the_name_of_a_known_operator_in_another_namespace_is_another_operator():
    families = group(Net(lambda x: add(x, 1)), (torch.randn(2, 4),))
    assert families.families == ()
    assert "no rule for ocsfast_tests::add" in families.frozen[0].reason


@pytest.mark.parametrize("name", ["doubled", "ocsfast_tests::tripled"])
def test_unknown_operators_are_refused(name):
    with pytest.raises(ocsfast.ConfigError, match="torch has no such operator"):
        ocsfast.register_rule(name)
