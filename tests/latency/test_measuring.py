"""Tables measured with a clock that is told what calls take."""

import logging

import pytest
import torch
from helpers.clocks import EACH, NANOSECOND, WeightClock, weights_of
from helpers.networks import Net, batch, net
from torch import nn
from torch.nn import functional as F

import ocsfast
from ocsfast import GroupingError, LatencyTable, StateError
from ocsfast.choice.targets import target_products
from ocsfast.ops.cost import build_cost_model


def measured(model, x, **more):
    return LatencyTable.measure(model, x, clock=WeightClock(model), **more)


def cost_of(table, families):
    return build_cost_model(families, *target_products(table, families, {}))


def cut_counts(families, share):
    """Kept counts, and the mask that leaves them."""
    kept = [max(1, round(share * size)) for size in families.sizes]
    mask = torch.zeros(families.num_groups, dtype=torch.bool)
    for family, left in zip(families.families, kept, strict=True):
        mask[family.first + left : family.first + family.size] = True
    return kept, mask


class Grouped(nn.Module):
    """A depthwise convolution, a grouped one, a transposed one and a concatenation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 24, 1, groups=4)
        self.norm = nn.GroupNorm(4, 24)
        self.up = nn.ConvTranspose2d(24, 8, 2, stride=2)
        self.down = nn.Conv2d(8, 8, 2, stride=2)
        self.last = nn.Conv2d(24 + 8, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.grouped(F.relu(self.depthwise(F.relu(self.stem(x))))))
        x = self.norm(x)
        x = torch.cat([x, F.relu(self.down(self.up(x)))], 1)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.heads = nn.Linear(6, 32), 4
        self.norm = nn.LayerNorm(32)
        self.qkv, self.proj, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x):
        x = self.embed(x)
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        return self.head((x + self.proj(y)).mean(1))


MODELS = {
    "plain": (Net, (4, 3, 8, 8)),
    "grouped": (Grouped, (4, 3, 8, 8)),
    "attention": (Attention, (4, 5, 6)),
}


@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_exact_where_times_are_bilinear(name):
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = build(), torch.randn(shape)
    families = ocsfast.group(model, x)
    assert families.families
    table = measured(model, x)
    cost = cost_of(table, families)
    linear = weights_of(model)
    assert table.dense == EACH * linear == cost(families.sizes)
    for share in (0.75, 0.5):
        kept, mask = cut_counts(families, share)
        small = build()
        ocsfast.cut_model(small, families, mask)
        small(x)
        assert cost(kept) == pytest.approx(EACH * weights_of(small), rel=1e-4)


def test_every_point_is_called_at_the_widths_that_a_cut_leaves():
    model = Grouped()
    called = []

    def clock(call):
        call()
        called.append((call.operator, call.shapes))
        return NANOSECOND

    half = {"grid": 2, "max_family_ratio": 0.375}  # the lowest counts are half of all
    LatencyTable.measure(model, torch.randn(4, 3, 8, 8), clock=clock, **half)
    shapes = {name.split(".")[1]: set() for name, _ in called if "." in name}
    for name, given in called:
        if "." in name:
            shapes[name.split(".")[1]].add(given[:2])
    assert ((4, 8, 8, 8), (8, 1, 3, 3)) in shapes["conv2d"]  # half of the depthwise one
    assert ((4, 8, 8, 8), (12, 4, 1, 1)) in shapes["conv2d"]  # two of the four groups
    assert ((4, 12, 8, 8), (12,)) in shapes["group_norm"]
    assert ((4, 12, 8, 8), (4, 4, 8, 8)) in shapes["cat"]
    assert ("model", ((4, 3, 8, 8),)) in called


def test_equal_operators_are_timed_once():
    model = nn.Sequential(
        *(layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 2)
    )
    x = torch.randn(4, 8)
    table = measured(model, x)
    nodes = {entry.operator: [] for entry in table.entries}
    for entry in table.entries:
        nodes[entry.operator].append(entry.nodes)
    assert ("linear_1", "linear_2") in nodes["aten.linear.default"]
    assert len(nodes["aten.relu.default"]) == 1
    clock = WeightClock(model)
    LatencyTable.measure(model, x, clock=clock, grid=2)
    assert clock.calls < 200


def test_memory_formats_and_dtypes_are_those_of_the_model():
    seen = set()

    def clock(call):
        result = call()
        if call.operator.startswith("aten.conv2d"):
            seen.add((result.dtype, result.is_contiguous(memory_format=torch.channels_last)))
        return NANOSECOND

    x, _ = batch(0)
    model = net().to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    given = x.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    table = LatencyTable.measure(model, given, clock=clock, grid=2)
    assert seen == {(torch.bfloat16, True)}
    assert (table.dtype, table.memory_format) == ("bfloat16", "channels_last")


def test_the_rest_of_the_model_is_shared_out():
    """Half of what the operators alone do not take scales with them, and half stays."""
    model, (x, _) = net(), batch(0)
    layers = EACH * weights_of(model)
    table = LatencyTable.measure(model, x, clock=WeightClock(model, rest=layers))
    assert table.dense == 2 * layers
    assert table.rest == pytest.approx(layers / 2, rel=1e-4)
    families = ocsfast.group(model, x)
    kept, mask = cut_counts(families, 0.5)
    ocsfast.cut_model(model, families, mask)
    expected = 1.5 * EACH * weights_of(model) + layers / 2
    assert cost_of(table, families)(kept) == pytest.approx(expected, rel=1e-4)


def test_operators_that_sum_to_more_than_the_model_are_scaled():
    model, (x, _) = net(), batch(0)
    layers = EACH * weights_of(model)
    table = LatencyTable.measure(model, x, clock=WeightClock(model, rest=-layers // 2))
    assert table.dense == layers - layers // 2
    assert table.rest <= len(table.entries)  # nanoseconds that rounding leaves
    assert cost_of(table, ocsfast.group(model, x))((8, 12, 10)) == table.dense


def test_the_model_is_left_as_it_was():
    model, (x, _) = net(), batch(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    LatencyTable.measure(model, x, grid=2, time_limit=60, clock=lambda call: call() is None or 1e-6)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


def noisy(call):
    noisy.turn = -getattr(noisy, "turn", 1.0)
    return 1.0 + 0.5 * noisy.turn if call.operator == "model" else NANOSECOND


@pytest.fixture
def failing(monkeypatch):
    """A function: let the calls for which a test is true have no kernel."""
    from ocsfast.latency import measuring

    make = measuring.make_call

    def without(test):
        def made(*args):
            call = make(*args)
            if test(call):
                raise RuntimeError("no such kernel")
            return call

        monkeypatch.setattr(measuring, "make_call", made)

    return without


@pytest.mark.parametrize(
    ("clock", "more", "said"),
    [
        (noisy, {}, "varies too much .* a batch takes .* half of 20 lie between 500 and 1.5e\\+03 ms"),
        (lambda call: -1.0, {}, "the clock said -1.0 of model: seconds are expected"),
        (lambda call: float("nan"), {}, "the clock said nan of model"),
        (lambda call: None, {}, "the clock said None of model"),
        (
            lambda call: 1.0,
            {"time_limit": 5},
            "at .* widths take some .* s to measure, and time_limit=5",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(clock, more, said):
    with pytest.raises(StateError, match=said):
        LatencyTable.measure(net(), batch(0)[0], clock=clock, **more)


def test_operators_that_cannot_be_called_alone_belong_to_the_rest(failing):
    model, (x, _) = net(), batch(0)
    failing(lambda call: True)
    with pytest.raises(StateError, match="nothing was measured"):
        LatencyTable.measure(model, x, clock=lambda call: 1.0)


def test_what_goes_wrong_with_the_clock_is_its_own_error():
    model, (x, _) = net(), batch(0)
    calls = []

    def clock(call):
        calls.append(call)
        if len(calls) == 60:
            raise TimeoutError("the device is asleep")
        return 1e-3

    with pytest.raises(TimeoutError, match="asleep"):
        LatencyTable.measure(model, x, clock=clock)


def test_operators_that_cannot_be_called_narrower_count_by_their_size(failing, caplog):
    model, (x, _) = net(), batch(0)
    caplog.set_level(logging.INFO, "ocsfast")

    def second(call):
        return call.operator.startswith("aten.conv2d") and call.shapes[1][1] == 8

    failing(lambda call: second(call) and call.shapes[1] != (12, 8, 3, 3))

    def clock(call):
        return 1e-3 if second(call) or call.operator == "model" else 0.0

    table = LatencyTable.measure(model, x, clock=clock)
    (entry,) = (e for e in table.entries if e.shapes[1:2] == ((12, 8, 3, 3),))
    assert entry.rows.kept == (3, 12)
    assert entry.cols.kept == (2, 8)
    assert entry.nanoseconds == ((62500, 250000), (250000, 1000000))
    assert "conv2d.default of conv2 is not timed at" in caplog.text


def test_a_coarser_grid_where_time_is_short(caplog):
    model, (x, _) = net(), batch(0)
    caplog.set_level(logging.WARNING, "ocsfast")
    table = LatencyTable.measure(model, x, clock=lambda call: 2e-2, time_limit=8)
    assert "time_limit=8 leaves a grid of" in caplog.text
    assert max(len(entry.nanoseconds) for entry in table.entries) < 5


def test_nothing_to_prune_is_nothing_to_measure():
    with pytest.raises(GroupingError, match="nothing in this model can be pruned"):
        LatencyTable.measure(nn.Linear(4, 2), torch.randn(2, 4))


@pytest.mark.parametrize("options", [{"grid": 1}, {"grid": 2.5}, {"time_limit": 0}, {"tme_limit": 3}])
def test_wrong_options(options):
    with pytest.raises(ocsfast.ConfigError, match=next(iter(options))):
        LatencyTable.measure(net(), batch(0)[0], **options)


def test_a_real_clock():
    """On whatever machine this is: times are positive and the dense model is the sum."""
    model, (x, _) = (
        nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 4)),
        (torch.randn(64, 256), 0),
    )
    try:
        table = LatencyTable.measure(model, x, grid=2)
    except StateError:  # the times vary too much
        pytest.skip("the machine is too busy to time anything")
    total = sum(entry.nanoseconds[-1][-1] * len(entry.nodes) for entry in table.entries)
    assert 0 < total <= table.dense
    assert total + table.rest == table.dense
