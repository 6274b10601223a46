"""Containers and objects whose own methods import, compute or raise: they are read all the same."""

import collections
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ocsfast


def closed(base):
    """A container whose own methods are not to be called: reading it would import or compute."""

    def refuse(self, *args):
        raise AssertionError("read by an overridden method")

    names = (
        "__getitem__",
        "__iter__",
        "__len__",
        "items",
        "keys",
        "values",
        "__contains__",
        "__setitem__",
    )
    written = ("clear", "update", "extend", "append", "__getattr__", "__reduce_ex__")
    return type(f"Closed{base.__name__}", (base,), dict.fromkeys((*names, *written), refuse))


CLOSED = {
    dict: lambda thing, x: dict.__setitem__(thing, "new", x),
    collections.OrderedDict: lambda thing, x: collections.OrderedDict.__setitem__(thing, "new", x),
    list: lambda thing, x: list.append(thing, x),
    collections.deque: lambda thing, x: collections.deque.append(thing, x),
    set: lambda thing, x: set.add(thing, x),
}


@pytest.mark.parametrize("base", CLOSED)
def test_containers_are_read_and_written_by_the_methods_of_their_base(base):
    class Using(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)
            self.store = [closed(base)(), closed(tuple)()]

        def forward(self, x):
            x = F.relu(self.a(x))
            CLOSED[base](self.store[0], x)
            return self.o(x)

    model, x = Using(), torch.randn(2, 8)
    found = ocsfast.inspect(model, x, verify=False)
    assert found.frozen[0].reason == "left behind in store[0]" + {
        dict: ".new",
        collections.OrderedDict: ".new",
    }.get(base, "[0]")
    assert base.__len__(model.store[0]) == 0


class Lazy:
    """An object that answers nothing by the ways that a class can define."""

    __slots__ = ("kept",)

    def __getattribute__(self, name):
        raise RuntimeError("not loaded yet")


def test_objects_that_refuse_to_be_read_are_read_all_the_same():
    class Proxy:
        def __getattr__(self, name):
            raise RuntimeError("not connected")

        @property
        def __dict__(self):
            raise RuntimeError("not connected")

        @property
        def __class__(self):
            raise RuntimeError("not connected")

    class Using(nn.Module):
        lazy: ClassVar = Proxy()

        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)
            self.store = [Lazy(), Proxy()]
            self.odd = {Odd(): 1}

        def forward(self, x):
            object.__setattr__(self.store[0], "kept", x)
            return self.o(F.relu(self.a(x)))

    class Odd:
        def __repr__(self):
            raise RuntimeError("no name yet")

    model, x = Using(), torch.randn(2, 8)
    assert ocsfast.inspect(model, x, verify=False).families[0].groups == 16
    with pytest.raises(AttributeError):
        object.__getattribute__(model.store[0], "kept")
