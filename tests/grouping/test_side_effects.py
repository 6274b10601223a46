"""`inspect` and `attach` leave a model as it was, whatever its pass writes, and where they refuse."""

from __future__ import annotations

import collections
import functools
import random
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers.untouched import attach, unchanged
from torch import nn
from torch.nn import functional as F

import ocsfast
from ocsfast.grouping.engines import group

GLOBAL = {}


class Store:
    """An object of the user's own."""

    def __init__(self):
        self.last = None
        self.all = collections.deque(maxlen=3)


class Writer(nn.Module):
    grid = None
    shared: ClassVar[dict] = {}
    count = 0

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.last, self.listed, self.named, self.steps = None, [None, "x"], {"k": 1}, 0
        self.nested = [{"deep": ([],)}]
        self.store = Store()
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.plain = torch.arange(3.0)
        closed, own = [], None

        def hook(module, args, output):
            nonlocal own
            own = output
            closed.append(output)
            GLOBAL["b"] = output

        self.b.register_forward_hook(hook)
        self.b.register_forward_pre_hook(self.counted)

    def counted(self, module, args):
        self.steps += 1
        self.nested[0]["deep"][0].append(args[0])

    def forward(self, x):
        if self.last is not None and self.last.shape[1] != 8:
            raise RuntimeError("a feature of another width")
        x = F.relu(self.a(x))
        self.last, self.listed[0], self.named["feature"] = x, x, x * 2
        Writer.grid, Writer.count = x.mean(), Writer.count + 1
        Writer.shared["x"], type(self).fresh = x, x
        self.store.last = x
        self.store.all.append(x)
        self.new_one = x
        random.random()
        np.random.rand()
        self.b.flag = self.training
        f = F.relu(self.b(x))
        return self.o(f.mean((2, 3)) + torch.rand(1))


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_nothing_that_a_pass_writes_stays(trained):
    torch.manual_seed(0)
    model, x = Writer(), torch.randn(2, 3, 8, 8)
    model.b.eval()  # a mode of its own
    if trained:  # what it keeps then belongs to a graph: no leaves, which deepcopy refuses
        model(x).sum().backward()
    assert not unchanged(
        model,
        lambda: ocsfast.inspect(model, x, 0.3),
        lambda: attach(model, x, outputs=("0",)),
        lambda: ocsfast.as_graph(model, x),
        lambda: ocsfast.group(model, x),
        besides=GLOBAL,
    )
    assert trained or not hasattr(Writer, "fresh")
    assert trained or Writer.grid is None


def test_nothing_stays_after_a_refusal(caplog):
    class Branching(Writer):
        def forward(self, x):
            y = super().forward(x)
            return y * 2 if bool(y.sum() > 0) else y

    model, x, wide = Branching(), torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8, 8)
    other = Writer()
    refused = unchanged(
        model,
        lambda: ocsfast.inspect(model, x),
        lambda: attach(model, x, outputs=("0",)),
        lambda: ocsfast.as_graph(model, x),
        lambda: ocsfast.inspect(other, wide),
        lambda: attach(model, x, ratio=0.999, forward=Writer.forward),
        lambda: attach(model, x, time_limit=1e-9),
        lambda: attach(model, x, keep=["nothing of the kind"]),
        besides=GLOBAL,
    )
    assert len(refused) == 5  # the second engine inspects the first, and attaches to it


def test_a_buffer_that_a_pass_changes_in_place_is_put_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)
            self.register_buffer("passes", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.passes += 1
            return self.o(F.relu(self.a(x)))

    model, x = Counting(), torch.randn(2, 8)
    assert not unchanged(model, lambda: ocsfast.as_graph(model, x), lambda: ocsfast.inspect(model, x))
    assert int(model.passes) == 0


@functools.lru_cache
def grid(size, device):
    return torch.arange(size, dtype=torch.float32, device=device)


MADE = {}


def remembered(size):
    """A helper with a cache by hand, that the forward pass calls."""
    if size not in MADE:
        MADE[size] = torch.arange(size)
    return MADE[size]


def test_caches_of_the_functions_that_a_pass_calls_are_put_back():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)

        @functools.lru_cache  # noqa: B019
        def scale(self, size):
            return torch.ones(size)

        def forward(self, x):
            x = x + grid(x.shape[1], x.device) + remembered(x.shape[1]) * self.scale(8)
            return self.o(F.relu(self.a(x)))

    model, x = Positions(), torch.randn(2, 8)
    assert ocsfast.inspect(model, x).families[0].groups == 16
    assert MADE == {}
    assert grid.cache_info().currsize == Positions.scale.cache_info().currsize == 0
    model(x).sum().backward()  # with tensors that hold data
    before = MADE[8]
    assert not unchanged(model, lambda: ocsfast.inspect(model, x), lambda: attach(model, x))
    assert MADE[8] is before


class Positions:
    """A cache that is an object of the module, or a class."""

    table: ClassVar[dict] = {}

    def __init__(self):
        self.own = {}

    def get(self, size):
        if size not in self.own:
            self.own[size] = torch.arange(size) / 100
        return self.own[size]

    @classmethod
    def shared(cls, size):
        if size not in cls.table:
            cls.table[size] = torch.arange(size) / 100
        return cls.table[size]


class Slotted:
    __slots__ = ("kept",)

    def get(self, size):
        if not hasattr(self, "kept"):
            self.kept = torch.arange(size) / 100
        return self.kept


CACHE, SLOTS = Positions(), Slotted()


def of_a_global(size):
    global MADE_ONCE
    if "MADE_ONCE" not in globals():
        MADE_ONCE = torch.arange(size) / 100
    return MADE_ONCE


@pytest.mark.parametrize("get", [CACHE.get, Positions.shared, SLOTS.get, of_a_global])
def test_caches_anywhere_in_the_module_are_put_back(get):
    class Using(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x):
            if get is of_a_global:
                x = x + of_a_global(8)
            elif get == Positions.shared:
                x = x + Positions.shared(8)
            else:
                x = x + (SLOTS if get == SLOTS.get else CACHE).get(8)
            return self.o(F.relu(self.a(x)))

    model, x = Using(), torch.randn(2, 8)
    assert ocsfast.inspect(model, x).families[0].groups == 16
    assert Positions.table == CACHE.own == {}
    assert not hasattr(SLOTS, "kept")
    assert "MADE_ONCE" not in globals()
    assert type(model(x)) is torch.Tensor
    Positions.table.clear()
    CACHE.own.clear()
    if hasattr(SLOTS, "kept"):
        del SLOTS.kept
    globals().pop("MADE_ONCE", None)


def test_stores_that_are_long_or_far_are_put_back():
    class Manager:
        def __init__(self):
            self.stores = {"b": Store()}

    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.o = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
            self.log = [torch.zeros(())] * 20_000
            self.trainer = types.SimpleNamespace(manager=Manager())
            self.b.register_forward_hook(lambda m, args, out: self.keep(out))

        def keep(self, out):
            self.trainer.manager.stores["b"].all.append(out)

        def forward(self, x):
            x = F.relu(self.a(x))
            self.log.append(x.mean())
            return self.o(F.relu(self.b(x)))

    model, x = Far(), torch.randn(2, 8)
    model(x).sum().backward()
    count = len(model.log), len(model.trainer.manager.stores["b"].all)
    found = ocsfast.inspect(model, x)
    assert {f.where: f.reason for f in found.frozen}["b"].startswith("left behind in ")
    assert (len(model.log), len(model.trainer.manager.stores["b"].all)) == count


def test_generators_of_a_module_are_put_back():
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)
            self.random, self.numpy = random.Random(0), np.random.default_rng(0)
            self.torch = torch.Generator().manual_seed(0)

        def forward(self, x):
            x = x * (1 + self.random.random() + float(self.numpy.random()))
            return self.o(F.relu(self.a(x)))

    def states(model):
        return (
            model.random.getstate(),
            model.numpy.bit_generator.state,
            model.torch.get_state().tolist(),
        )

    model, x = Drawing(), torch.randn(2, 8)
    before = states(model)
    ocsfast.inspect(model, x)
    assert states(model) == before


def test_a_model_may_have_a_call_of_its_own():
    class Calling(nn.Sequential):
        def __call__(self, x):
            return super().__call__(x).log_softmax(-1)

    model = Calling(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    assert ocsfast.inspect(model, torch.randn(2, 8)).families[0].groups == 16


class Scaling(nn.Module):
    """It writes to what it is given, as models of images between 0 and 1 do."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        x *= 255
        return self.last(self.first(x).relu())


def test_a_pass_may_write_to_its_inputs():
    x = torch.rand(2, 6)
    before = x.clone()
    families = group(Scaling(), (x,))
    assert [family.name for family in families.families] == ["first"]
    graph = ocsfast.as_graph(Scaling(), x)
    assert torch.equal(x, before)
    assert group(graph, (x,)).num_groups == 8
