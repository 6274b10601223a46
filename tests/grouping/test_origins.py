"""Integers that know their attribute: wherever it is kept, and through other people's caches."""

from functools import cache, lru_cache

import pytest
import torch
from torch import nn

import ocsfast
from ocsfast.cut.sizes import set_size, size_attributes
from ocsfast.grouping.engines import group


@lru_cache(256)
def shape_with(heads, batch, length):
    """As libraries for reshaping do: what is computed of sizes is kept, by sizes."""
    return (batch, length, heads, -1)


class Tools:
    @staticmethod
    @cache
    def by_class(heads, batch, length):
        return shape_with.__wrapped__(heads, batch, length)


def closed_over():
    kept = cache(shape_with.__wrapped__)
    return lambda *sizes: kept(*sizes)


class Block(nn.Module):
    """Attention whose heads are counted by whatever `keep` makes of their number."""

    def __init__(self, keep, get, shape):
        super().__init__()
        self.get, self.shape = get, shape
        keep(self, 4)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        heads = self.get(self)
        q, k, v = (t.view(self.shape(heads, *x.shape[:2])) for t in self.qkv(x).chunk(3, -1))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(0.5).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


class Net(nn.Module):
    def __init__(self, *how):
        super().__init__()
        self.inputs = nn.Linear(6, 16)
        self.blocks = nn.ModuleList(Block(*how) for _ in range(2))
        self.outputs = nn.Linear(16, 3)

    def forward(self, x):
        x = self.inputs(x)
        for block in self.blocks:
            x = x + block(x)
        return self.outputs(x)


def plain(name, wrapped=lambda n: n, inner=lambda value: value):
    return (
        lambda block, n: setattr(block, name, wrapped(n)),
        lambda block: inner(getattr(block, name)),
    )


PLACES = {
    "attribute": plain("heads"),
    "private": plain("_heads"),
    "dict": plain("sizes", lambda n: {"heads": n, "name": "q", "drop": 0.1}, lambda v: v["heads"]),
    "pairs": plain("_axes", lambda n: (("heads", n), ("rest", -1)), lambda v: dict(v)["heads"]),
    "list": plain("sizes", lambda n: [n, 7], lambda v: v[0]),
}
CACHES = {
    "none": shape_with.__wrapped__,
    "global": shape_with,
    "class": Tools.by_class,
    "closure": closed_over(),
}
CASES = [*((place, "none") for place in PLACES), *(("attribute", kept) for kept in CACHES)]


@pytest.mark.parametrize(("place", "kept"), CASES)
def test_heads_go_from_each_block_by_itself(place, kept):
    torch.manual_seed(0)
    x, make = torch.randn(2, 5, 6), lambda: Net(*PLACES[place], CACHES[kept])
    model = make()
    model(x)  # fills the cache
    families = group(model, (x,))
    heads = [f for f in families.families if f.kind == "head"]
    assert [(f.size, f.layers[0]) for f in heads] == [(4, "blocks.0.qkv"), (4, "blocks.1.qkv")]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=x, kinds=("head",)).cut()
    left = [block.get(block) for block in model.blocks]
    assert all(type(n) is int for n in left)
    assert [block.qkv.out_features for block in model.blocks] == [12 * n for n in left]
    assert min(left) < 4
    model(x).sum().backward()


def test_a_cache_keeps_what_it_had():
    shape_with.cache_clear()
    model = Net(*PLACES["attribute"], shape_with)
    model(torch.randn(2, 5, 6))
    before = shape_with.cache_info()
    group(model, (torch.randn(2, 5, 6),))
    assert shape_with.cache_info() == before


def test_sizes_wherever_a_module_keeps_them():
    module = nn.Module()
    module.heads, module._width, module.sizes = 4, 8, [3, (5, {"h": 6})]
    module.flags, module.names, module.weights = [True], ["a"], [torch.zeros(2), 3]
    expected = {"heads": 4, "_width": 8, "sizes[0]": 3, "sizes[1][0]": 5, "sizes[1][1]['h']": 6}
    assert size_attributes(module) == expected
    set_size(module, "sizes[1][1]['h']", 2)
    assert module.sizes == [3, (5, {"h": 2})]
    set_size(module, "_width", 1)
    assert module._width == 1


def test_a_private_counter_is_no_obstacle_to_loading(tmp_path):
    model, other = nn.Linear(4, 6), nn.Linear(4, 6)
    model._calls, other._calls = 12, 0
    ocsfast.save(model, tmp_path / "model")
    ocsfast.load(other, tmp_path / "model")
    assert other._calls == 0
    assert torch.equal(other.weight, model.weight)


class Keeping(nn.Module):
    """It keeps a feature beside a number, in a dict."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.state = nn.Linear(6, 8), nn.Linear(8, 3), {"calls": 3}

    def forward(self, x):
        self.state["feature"] = self.first(x).relu()
        return self.last(self.state["feature"])


def test_what_is_left_behind_beside_a_number_is_seen():
    model, x = Keeping(), torch.randn(2, 6)
    with pytest.raises(ocsfast.OcsfastError, match=r"first: left behind in state\.feature"):
        ocsfast.attach(
            model, 0.5, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), example_inputs=x
        )
    assert model.state == {"calls": 3}


def test_a_dict_that_blocks_share_names_each_blocks_heads():
    shared = {"heads": 4}
    model = Net(plain("unused")[0], lambda block: block.sizes["heads"], shape_with.__wrapped__)
    for block in model.blocks:
        block.sizes = shared
    families = group(model, (torch.randn(2, 5, 6),))
    assert sum(f.kind == "head" for f in families.families) == 2
    assert shared == {"heads": 4}


class Octave(nn.Module):
    """One weight, sliced in both dimensions by attributes: two widths of one value each."""

    def __init__(self, width):
        super().__init__()
        self.stem, self.high_in = nn.Linear(5, width), width
        self.weight, self.high_out = nn.Parameter(torch.randn(2 * width, 2 * width)), width
        self.high, self.low = nn.Linear(width, 3), nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, x.sin()], -1)
        low_to_low = self.weight[self.high_out :, self.high_in :]
        high_to_high = self.weight[0 : self.high_out, 0 : self.high_in]
        high = x[..., : self.high_in] @ high_to_high.T
        return self.high(high) + self.low(x[:, self.high_in :] @ low_to_low.T)


def test_each_slice_of_a_subscript_follows_its_own_dimension():
    model = Octave(6)
    families = group(model, (torch.randn(2, 5),))
    assert not families.frozen or all("model output" in f.reason for f in families.frozen)
    counted = {a.name: set(a.groups.tolist()) for a in families.attributes}
    rows = {a.tensor: a.groups for a in families.axes if a.axis == 0}
    assert counted["high_in"] == set(rows["stem.weight"].tolist())
    assert counted["high_out"] == set(rows["weight"][:6].tolist())
    assert len(families.families) == 3
