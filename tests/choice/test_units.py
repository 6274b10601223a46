"""round_to="auto": by how many groups families shrink, on one device and another, and once resumed."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers.builders import families
from helpers.networks import batch
from torch import nn

import ocsfast
from ocsfast import Config, ConfigError, StateError
from ocsfast.choice.budget import coarsest, make_aim
from ocsfast.choice.units import multiple_for, units_of
from ocsfast.core.families import Product

CPU = torch.device("cpu")


@pytest.fixture
def processor(monkeypatch):
    """Says what the processor can do."""

    def can(capability):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)

    can("AVX512")
    return can


def wide():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 1024),
        nn.ReLU(),
        nn.Linear(1024, 5),
    )


def coarse():
    """Two layers alone, of which a unit of 16 is a fourth and half."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 32, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)),
    )


def attached(model, ratio=0.5, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"example_inputs": batch(0)[0], "total_steps": 100, "round_to": "auto", **options}
    return ocsfast.attach(model, ratio, optimizer=optimizer, **options)


@pytest.mark.parametrize(
    ("device", "capability", "multiple"),
    [
        ("cpu", "AVX512", 16),
        ("cpu", "AVX2", 8),
        ("cpu", "DEFAULT", 8),
        ("cuda", "AVX512", 8),
        ("meta", "AVX512", 8),
    ],
)
def test_a_device_has_its_multiple(processor, device, capability, multiple):
    processor(capability)
    assert multiple_for("auto", torch.device(device)) == multiple
    assert multiple_for(6, torch.device(device)) == 6


def a_family(size, each, kind="channel", dims=2):
    """One family whose groups are so many outputs each."""
    labels = torch.arange(size).repeat_interleave(each)
    found = families([size], {"w": {0: labels}, "next": {1: labels}})
    found = replace(found, families=(replace(found.families[0], kind=kind),))
    return found, {"w": torch.zeros(size * each, *[2] * (dims - 1)), "next": torch.zeros(2, size * each)}


@pytest.mark.parametrize(
    ("size", "each", "kind", "unit"),
    [
        (64, 1, "channel", 16),
        (63, 1, "neuron", 8),  # 16 would be fewer than four times in it
        (32, 1, "channel", 8),
        (16, 1, "channel", 4),
        (4, 1, "channel", 1),
        (12, 64, "head", 1),
        (64, 8, "head", 2),
        (64, 12, "head", 4),  # four heads are 48 outputs
        (64, 12, "head_dim", 16),
    ],
)
def test_a_unit_is_of_outputs_and_no_more_than_a_quarter(size, each, kind, unit):
    found, parameters = a_family(size, each, kind)
    assert units_of(found, parameters, "auto", 16) == (unit,)
    assert units_of(found, parameters, 6, 6) == (6,)
    multiple = replace(found, multiple=3)
    assert units_of(multiple, parameters, "auto", 16) == (3 * unit,)


def test_vectors_say_nothing_of_outputs():
    """As the scales of a norm, which has an entry for each of a group's outputs too."""
    found, parameters = a_family(64, 8, dims=1)
    assert units_of(found, parameters, "auto", 16) == (16,)


def test_tied_families_have_one_unit():
    labels = torch.arange(8)
    found = families([8, 8], {"a": {0: labels}, "b": {0: (8 + labels).repeat_interleave(2)}})
    parameters = {"a": torch.zeros(8, 2), "b": torch.zeros(16, 2)}
    assert units_of(found, parameters, "auto", 4) == (2, 2)
    assert units_of(found, parameters, "auto", 2) == (2, 1)
    assert units_of(found, parameters, "auto", 2, ties=(0, 0)) == (2, 2)


@pytest.mark.parametrize(("capability", "multiple"), [("AVX512", 16), ("AVX2", 8)])
def test_a_cut_leaves_what_the_device_likes(processor, capability, multiple):
    processor(capability)
    model = wide()
    pruner = attached(model)
    assert pruner.state_dict()["multiple"] == multiple
    report = pruner.cut()
    kept = [n for _, n, size in report.kept if n < size]
    assert kept
    assert all(n % multiple == 0 for n in (model[0].out_channels, model[5].out_features))
    assert report.cost <= report.cost_dense / 2


def test_a_ratio_that_needs_finer_units_has_them(processor):
    """Of 64 channels 14 must stay: 16, if by sixteen."""
    x, limit = batch(0)[0], {"max_family_ratio": 0.79}
    most = {n: ocsfast.inspect(wide(), x, round_to=n, **limit).largest_ratio for n in (1, 16, "auto")}
    assert most[16] < most[1] == most["auto"]
    models = [wide() for _ in range(3)]
    pruner = attached(models[0], most[1] - 1e-3, **limit)
    assert pruner.state_dict()["multiple"] < 16
    assert pruner.cut().cut
    assert attached(models[1], most[16] - 1e-3, **limit).state_dict()["multiple"] == 16
    with pytest.raises(ConfigError, match=r"kept counts in multiples of 16 at most .* lower round_to"):
        attached(models[2], most[1] - 1e-3, round_to=16, **limit)


def test_units_that_would_take_much_more_than_asked_for_are_halved(processor):
    x, models = batch(0)[0], [coarse() for _ in range(2)]
    by_sixteen = attached(models[0], round_to=16).cut()
    assert by_sixteen.cost < 0.48 * by_sixteen.cost_dense
    pruner = attached(models[1])
    assert pruner.state_dict()["multiple"] < 16
    found = ocsfast.inspect(coarse(), x, 0.5, round_to="auto")
    assert found.overshoot <= 0.02
    report = pruner.cut()
    assert [kept for _, kept, _ in report.kept] == [family.kept for family in found.families]
    assert 0.48 * report.cost_dense <= report.cost <= 0.5 * report.cost_dense


def test_a_coarse_unit_is_named():
    found, parameters = a_family(64, 1)
    found = replace(found, macs=(Product(1, torch.arange(64), None, "w"),))
    parameters = {name: nn.Parameter(value) for name, value in parameters.items()}
    aim = make_aim(found, parameters, Config(round_to=16), 0.3)
    assert coarsest(aim, found) == (
        "16 groups at a time of f0 (a channel in 1 layer) are 25.0 % of the dense cost. "
        "It may be finer with a smaller round_to"
    )


def test_a_resumed_run_keeps_the_multiple_it_began_with(processor):
    models = [wide() for _ in range(6)]  # a pruner does not keep its model
    pruner = attached(models[0])
    pruner.step()
    state = copy.deepcopy(pruner.state_dict())
    assert state["multiple"] == 16
    kept = pruner.cut().kept

    processor("AVX2")
    other = attached(models[1])
    assert other.state_dict()["multiple"] == 8
    other.load_state_dict(state)
    assert other.state_dict()["multiple"] == 16
    assert other.cut().kept == kept

    for model, wrong in zip(models[2:], (None, 0, True, "auto"), strict=True):
        spoilt, again = {**state, "multiple": wrong}, attached(model)
        with pytest.raises(StateError, match="multiple of kept counts"):
            again.load_state_dict(spoilt)
        assert again.state_dict()["multiple"] == 8


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "8", None, "all"])
def test_bad_values_are_refused(value):
    with pytest.raises(
        ConfigError, match=r"round_to=.*: 'auto' or an integer of at least 1 is expected"
    ):
        Config(round_to=value)


def test_a_table_is_measured_at_what_a_cut_can_leave(processor):
    x = batch(0)[0]
    table = ocsfast.LatencyTable.measure(wide(), x, clock=lambda call: 1e-3, round_to="auto")
    counts = {e.rows.kept for e in table.entries if "conv" in e.operator and e.rows is not None}
    assert counts == {(16, 32, 48, 64)}


def test_where_nothing_fits_the_nearest_is_taken(processor):
    """Units of 1 take 2.2 % beyond, those of 8 a fifth."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 16))
    pruner = attached(model, 0.203, example_inputs=torch.randn(2, 16))
    pruner.cut()
    assert model[0].out_features == 31


def test_what_is_frozen_on_the_way_makes_units_finer(processor):
    gone = {}
    for round_to in (1, "auto"):
        torch.manual_seed(0)
        layers = (nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 16))
        model = nn.Sequential(*layers)
        pruner = attached(model, round_to=round_to, example_inputs=torch.randn(2, 16))
        model[0].weight.requires_grad_(False)
        report = pruner.cut()
        gone[round_to] = 1 - report.cost / report.cost_dense
    assert gone["auto"] >= 0.5
    assert gone[1] >= 0.5
