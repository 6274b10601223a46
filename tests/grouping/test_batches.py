"""What a model takes: no batch, one sample, rows that belong together, and inputs of any form."""

from __future__ import annotations

import collections
import dataclasses
import re
import types
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers.untouched import attach
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import ocsfast
from ocsfast import ConfigError, GroupingError


class Flat(nn.Module):
    """One image becomes one row, whatever the batch."""

    def __init__(self):
        super().__init__()
        self.c, self.a, self.o = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.o(F.relu(self.a(F.relu(self.c(x)).flatten())))


class Points(nn.Module):
    """A cloud of points [n, 3], its highest features, and a head that runs once."""

    def __init__(self):
        super().__init__()
        self.a, self.h, self.o = nn.Linear(3, 16), nn.Linear(16, 12), nn.Linear(12, 2)

    def forward(self, x):
        return self.o(F.relu(self.h(F.relu(self.a(x)).max(0).values)))


class Neighbours(Points):
    """The same on edges to the four nearest points."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 16)

    def forward(self, x):
        near = x[torch.cdist(x, x).topk(4, largest=False).indices]
        edges = torch.cat([x.unsqueeze(1).expand_as(near), near - x.unsqueeze(1)], -1)
        return self.o(F.relu(self.h(F.relu(self.a(edges)).amax((0, 1)))))


class Convolved(nn.Module):
    """A graph convolution: nodes [n, 3], edges as two vectors of node numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 16), nn.Linear(16, 4)

    def forward(self, x, source, target):
        x = F.relu(self.a(torch.zeros_like(x).index_add(0, target, x[source])))
        return self.o(torch.zeros_like(x).index_add(0, target, x[source]))


class Steps(nn.Module):
    """A sequence, steps first."""

    def __init__(self):
        super().__init__()
        self.e, self.r, self.o = nn.Linear(6, 12), nn.LSTM(12, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.o(self.r(F.relu(self.e(x)))[0][-1])


def image():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU()),
        *(nn.Flatten(0), nn.Linear(12 * 16, 5)),
    )


RING = torch.arange(20)
# The model, its input, and why that was traced as it is.
WHOLE = {
    "image without a batch": (image, (torch.randn(3, 8, 8),), "expected input.* to have 3 channels"),
    "one sample": (
        Flat,
        (torch.randn(1, 3, 8, 8),),
        "test_batches.py:.*but got .1, 576.*was not seen; a",
    ),
    "cloud": (Points, (torch.randn(32, 3),), r"dim 0 is no batch \(h runs once for all of it\)"),
    "two points": (Points, (torch.randn(2, 3),), r"dim 0 is no batch \(h runs once"),
    "neighbours": (Neighbours, (torch.randn(32, 3),), "k not in range"),
    "ring": (Convolved, (torch.randn(20, 3), RING, RING.roll(1)), "index 19 is out of bounds"),
    "one sequence": (Steps, (torch.randn(7, 6),), r"dim 0 is no batch \(o runs"),
    "vector": (
        lambda: nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 3)),
        (torch.randn(6),),
        "reduction",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_without_a_batch_is_traced_with_the_example_as_it_is(name, caplog):
    make, inputs, why = WHOLE[name]
    torch.manual_seed(0)
    model = make()
    found = ocsfast.inspect(model, inputs)
    (note,) = found.notes
    assert re.search(why, note), note
    with FlopCounterMode(display=False) as counter:
        model.eval()(*inputs)
    if not isinstance(model, Steps):  # torch counts no recurrent layer
        assert found.macs == counter.get_total_flops() // 2
    assert found.prunable > 0.9
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = ocsfast.attach(model, 0.4, optimizer=optimizer, example_inputs=inputs)
    assert note in caplog.text
    report = pruner.cut()
    assert report.cost <= 0.6 * report.cost_dense
    model(*inputs).sum().backward()


class Weighted(nn.Module):
    """A batch whose samples share a condition; training asks for as many targets."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x, scale=None, target=None):
        y = self.o(F.relu(self.a(x)) * (1.0 if scale is None else scale))
        return y if target is None else F.cross_entropy(y, target)


@pytest.mark.parametrize(
    "inputs",
    [
        (torch.randn(5, 6),),
        (torch.randn(1, 6),),
        (torch.randn(5, 6), torch.tensor(2.0)),
        (torch.randn(5, 6), torch.rand(1, 16)),
        (torch.randn(5, 6), None, torch.zeros(5, dtype=torch.long)),
    ],
)
def test_costs_of_a_batch_are_of_one_sample(inputs):
    found = ocsfast.inspect(Weighted(), inputs)
    assert (found.notes, found.macs) == ((), 6 * 16 + 16 * 3)


def test_a_mode_that_wants_the_whole_example_is_traced_with_it():
    class Fixed(Weighted):
        def forward(self, x):
            if self.training and len(x) != 5:
                raise ValueError("five samples should be given")
            return super().forward(x)

    found = ocsfast.inspect(Fixed(), torch.randn(5, 6))
    (note,) = found.notes
    assert "in training mode: ValueError" in note
    assert "where dim 0 is not 5 was not seen" in note
    assert found.macs == 5 * (6 * 16 + 16 * 3)


def test_an_example_that_fails_as_it_is_says_so():
    model = Flat()
    with pytest.raises(GroupingError, match=r"fails on example_inputs= \(\(3, 3, 8, 8\)\): .*1x864"):
        ocsfast.inspect(model, torch.randn(3, 3, 8, 8))


def test_the_second_engine_takes_the_example_as_it_is():
    class Fixed(Weighted):
        def forward(self, x):
            return super().forward(x.view(5, 6))

    found = ocsfast.inspect(Fixed(), torch.randn(5, 6), grouping="torch-pruning")
    assert (found.families[0].groups, found.macs) == (16, 5 * (6 * 16 + 16 * 3))
    assert "since with 2 samples the model cannot be traced" in found.notes[0]


def test_one_tensor_may_be_passed_twice():
    class Twice(Weighted):
        def forward(self, rows):
            return super().forward(torch.stack(rows))

    assert ocsfast.inspect(Twice(), ([torch.randn(6)] * 3,)).families[0].groups == 16


@dataclasses.dataclass(frozen=True)
class Record:
    x: torch.Tensor
    names: list
    rest: object = None

    def __post_init__(self):
        assert self.x.dim() == 2


class Pair(NamedTuple):
    x: torch.Tensor
    count: int


class Sample:
    """A class of the user's own, with tensors in its attributes."""

    __slots__ = ("__private", "path", "x")

    def __init__(self, x):
        self.x, self.path, self.__private = x, np.zeros(3), {"y": x}


class Named(dict):
    def __getattr__(self, name):
        return dict.__getitem__(self, name)

    def __getitem__(self, name):
        raise KeyError("by attribute alone")


class Holding(Weighted):
    def forward(self, batch, *rest):
        return super().forward(batch["x"] if type(batch) in (dict, collections.UserDict) else batch.x)


def rows():
    return torch.randn(5, 6)


@pytest.mark.parametrize(
    "batch",
    [
        lambda: Record(rows(), ["a.jpg"] * 5),
        lambda: Pair(rows(), 3),
        lambda: Sample(rows()),
        lambda: Named(x=rows()),
        lambda: collections.UserDict(x=rows(), size=np.zeros(2)),
        lambda: types.SimpleNamespace(x=rows(), kind=b"bytes"),
        lambda: {"x": rows(), "none": None, "scale": 2.0, "paths": ["a"], "array": np.ones(5)},
        lambda: {"x": rows(), "boxes": torch.randn(7, 4), "owner": torch.zeros(7)},
    ],
)
def test_a_batch_of_any_form_is_taken(batch):
    torch.manual_seed(0)
    model = Holding()
    inputs = (batch(), np.float32(3), torch.float32, object())
    found = ocsfast.inspect(model, inputs)
    assert (found.families[0].groups, found.macs, found.notes) == (16, 144, ())
    attach(model, inputs)


def test_inputs_that_nothing_can_be_done_with_are_refused():
    looped = types.SimpleNamespace(x=rows())
    looped.me = looped
    ragged = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)])
    for inputs, said in (
        (looped, r"a SimpleNamespace holds itself \(at .*\.me\)"),
        (ragged, "nested tensor"),
    ):
        for call in (ocsfast.inspect, ocsfast.as_graph):
            with pytest.raises(GroupingError, match=said):
                call(Holding(), (inputs,))
    with pytest.raises(ConfigError, match=r"holds a ndarray \(args\[1\]\), which a graph cannot take"):
        ocsfast.as_graph(Weighted(), (rows(), np.zeros(3)))
    with pytest.raises(ConfigError, match="example_inputs= holds no tensor"):
        ocsfast.as_graph(Weighted(), (3,))
    with pytest.raises(GroupingError, match=r"the model fails with 5 samples: .* BFloat16 and Float"):
        ocsfast.as_graph(Weighted(), rows().bfloat16())
