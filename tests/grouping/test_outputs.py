"""Whatever holds a model's outputs is taken apart, named and kept; what would hide one is refused."""

from __future__ import annotations

import collections
import dataclasses
import enum
import pickle
import types
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import ocsfast
from ocsfast import GroupingError
from ocsfast.grouping.trace.export import trace


@dataclasses.dataclass
class Plain:
    logits: torch.Tensor
    features: list
    count: int = 3


@dataclasses.dataclass
class Computing:
    logits: torch.Tensor
    inner: torch.Tensor = dataclasses.field(init=False, default=None)

    def __post_init__(self):
        self.inner = self.logits.softmax(-1)


class Two(NamedTuple):
    logits: torch.Tensor
    rest: object


class Own:
    def __init__(self, logits):
        self.logits = logits


class Keyed(dict):
    pass


class Listed(list):
    pass


class Keyless(dict):
    """Known to torch without the names of its entries, as diffusers' outputs are."""


pytree.register_pytree_node(
    Keyless,
    lambda x: (list(x.values()), list(x)),
    lambda values, keys: Keyless(zip(keys, values, strict=True)),
)


class Kind(enum.Enum):
    A = 1


class Returning(nn.Module):
    """Hands its inner features and its logits to a function that makes the output."""

    def __init__(self, make):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.make = make

    def forward(self, x):
        inner = F.relu(self.b(F.relu(self.a(x))))
        return self.make(self.o(inner), inner)


def computing(y, inner):
    out = Computing(y)
    out.inner = inner
    return out


OUTPUTS = {
    "dataclass": (lambda y, i: Plain(y, [i]), ("logits", "features.0", "count")),
    "field that is not initialised": (computing, ("logits", "inner")),
    "named tuple": (Two, ("logits", "rest")),
    "own": (lambda y, i: Own({"a": y, "b": i}), ("logits.a", "logits.b")),
    "namespace": (lambda y, i: types.SimpleNamespace(y=y, i=i), ("y", "i")),
    "user dict": (lambda y, i: collections.UserDict(y=y, i=i), ("data.y", "data.i")),
    "dict of a class": (lambda y, i: Keyed(y=y, i=i), ("y", "i")),
    "list of a class": (lambda y, i: Listed([y, i]), ("0", "1")),
    "without keys": (lambda y, i: Keyless(sample=y, inner=i), ("sample", "inner")),
    "enum": (lambda y, i: {Kind.A: y, (1, 2): i}, ("Kind.A", "(1, 2)")),
    "nested": (lambda y, i: (Plain(y, [Two(i, None)]), None), None),
    "distribution": (lambda y, i: (Normal(y, y.exp()), i), None),
    "beside what is none": (
        lambda y, i: (y, i, torch.float32, object(), b"x"),
        ("0", "1", "2", "3", "4"),
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_any_form_keep_their_shape(name):
    make, names = OUTPUTS[name]
    torch.manual_seed(0)
    model, x = Returning(make), torch.randn(4, 6)
    if names is not None:
        assert trace(model, (x,), {}, training=False).outputs == names
    found = ocsfast.inspect(model, x)
    assert [f.layers for f in found.families] == [("a",)]  # "b" makes an output too
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ocsfast.attach(model, 0.3, optimizer=optimizer, example_inputs=x).cut()
    assert model.a.out_features < 16


@pytest.mark.parametrize(
    "make",
    [
        lambda y, i: (z for z in (y, i)),
        lambda y, i: {y, i},
        lambda y, i: (y, lambda: i),
        lambda y, i: zip([y], [i], strict=True),
    ],
)
def test_outputs_that_hide_tensors_are_refused(make):
    said = "the model returns a .*, which a graph cannot: return tensors, or say in forward= what to run"
    with pytest.raises(GroupingError, match=said):
        ocsfast.inspect(Returning(make), torch.randn(4, 6))
    with pytest.raises(GroupingError, match=r"the model returns a|cannot trace the model"):
        ocsfast.inspect(Returning(make), torch.randn(4, 6), grouping="torch-pruning")


def test_the_second_engine_sees_outputs_of_any_form():
    model = Returning(lambda y, inner: Keyed(y=y, inner=inner))
    found = ocsfast.inspect(model, torch.randn(4, 6), grouping="torch-pruning")
    assert [f.groups for f in found.families] == [16]


def test_a_graph_returns_what_the_model_returns():
    torch.manual_seed(0)
    model, x = Returning(computing).eval(), torch.randn(4, 6)
    graph = ocsfast.as_graph(model, x).eval()
    out, other = graph(x), pickle.loads(pickle.dumps(graph))(x)
    for made in (out, other):
        assert type(made) is Computing
        torch.testing.assert_close((made.logits, made.inner), (model(x).logits, model(x).inner))
    with pytest.raises(GroupingError, match="the model returns a dtype, which a graph cannot"):
        ocsfast.as_graph(Returning(lambda y, i: (y, i.dtype)), x)
