"""What a trace does not see by itself: numbers of constants, sizes of the data, `.data`, exceptions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ocsfast
from ocsfast.grouping.engines import by_labels, group
from ocsfast.grouping.macs import count_macs
from ocsfast.grouping.scope import Scope
from ocsfast.ops.cost import build_cost_model


class Net(nn.Module):
    """Two layers over [samples, steps, features], and what happens between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(6, 8), nn.Linear(8, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


def by_list(x: Tensor) -> Tensor:
    return x - x.mean(torch.arange(1, x.dim()).tolist(), keepdim=True)


def by_order(x: Tensor) -> Tensor:
    order = torch.cat([torch.tensor([2, 0]), torch.arange(1, 2)])
    back = torch.zeros(3, dtype=torch.int64)
    back[order] = torch.arange(3)
    return x.permute(*order).exp().permute(*back)


def by_branch(x: Tensor) -> Tensor:
    sizes = torch.tensor([2, 3])
    return x.sin() if bool((sizes.cumsum(0) > 4).any()) and int(sizes[1]) == 3 else x[:, :0]


@pytest.mark.parametrize("between", [by_list, by_order, by_branch])
def test_numbers_of_constants_are_known_in_a_trace(between: Callable[[Tensor], Tensor]) -> None:
    model, x = Net(between), torch.randn(2, 5, 6)
    families = group(model, (x,))
    assert families.num_groups == 8
    assert not families.notes


def test_numbers_that_the_data_write_are_not() -> None:
    def counted(x: Tensor) -> Tensor:
        count = torch.zeros(1, dtype=torch.int64)
        count += (x > 0).sum()
        return x * int(count)

    with pytest.raises(ocsfast.GroupingError, match="data-dependent"):
        by_labels(Net(counted), (torch.randn(2, 5, 6),), {}, Scope())


class Edges(nn.Module):
    """Messages along the edges of a graph that are no loops: how many there are depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.message, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.heads, self.weight = 4, nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.first(x)
        start, end = edges[:, edges[0] != edges[1]]
        sent = self.message(x[start]).view(-1, self.heads, 2) * self.weight
        gathered = torch.zeros_like(x).index_add(0, end, sent.flatten(1))
        return self.last(x + gathered)


def test_sizes_that_depend_on_the_data_are_those_of_the_example() -> None:
    edges = torch.tensor([[0, 1, 2, 2, 4], [1, 1, 0, 3, 2]])
    model, x = Edges(), torch.randn(5, 6)
    families = group(model, (x, edges))
    assert [(family.name, family.size) for family in families.families] == [("first", 4)]
    assert {frozen.reason for frozen in families.frozen} == {"model output"}
    cost = build_cost_model(families, families.macs, "MACs")([4])
    with torch.no_grad():
        assert cost == count_macs(lambda: model(x, edges)) == 5 * 6 * 8 + 4 * 8 * 8 + 5 * 8 * 3


class Trying(nn.Module):
    """It passes lengths to every layer, and does without where a layer does not take them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Sequential(nn.Tanh()), nn.Linear(8, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            try:
                x = layer(x, lengths=None)
            except TypeError:
                x = layer(x)
        return x


def test_a_pass_that_raises_may_be_caught() -> None:
    families = group(Trying(), (torch.randn(2, 6),))
    assert [family.name for family in families.families] == ["layers.0"]


class Masked(nn.Conv1d):
    """A causal convolution, as models of pixels and of codes have it."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, padding=1)
        self.register_buffer("mask", torch.tensor([1.0, 1.0, 0.0]).expand_as(self.weight).clone())

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data * self.mask
        return super().forward(x)


def test_a_weight_that_each_pass_masks() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Masked(6, 8, 3), nn.Tanh(), Masked(8, 3, 3)), torch.randn(2, 6, 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    families = group(model, (x,))
    assert [(family.name, family.size) for family in families.families] == [("0", 8)]
    assert {a.tensor for a in families.axes} == {"0.weight", "0.bias", "0.mask", "2.weight", "2.mask"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Listed(nn.Module):
    """It reads its scales from a list, in which they stand beside being parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(8))
        self.scales = [self.scale]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * self.scales[0])


def test_a_parameter_in_a_list_is_a_parameter() -> None:
    families = group(Listed(), (torch.randn(2, 6),))
    assert [(family.name, family.size) for family in families.families] == [("first", 8)]
    assert "scale" in {axis.tensor for axis in families.axes}


class Slotted:
    __slots__ = ("_number",)


class Computed(Slotted):
    """A property in the place of a slot."""

    @property
    def _number(self) -> Tensor:
        return torch.zeros(1)


def test_a_property_over_a_slot_is_left_alone() -> None:
    model = Net(torch.tanh)
    model.holds = Computed()
    assert group(model, (torch.randn(2, 5, 6),)).num_groups == 8
