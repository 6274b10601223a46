"""The live run with target="latency": the time is what the ratio removes."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from helpers.clocks import EACH, WeightClock, weights_of
from helpers.fully_sharded import OPTIMIZERS, sharded
from helpers.networks import EPOCH, Net, batch, epochs, net, sgd, train
from helpers.ranks import same_everywhere, smooth
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import ocsfast
import ocsfast.api.latency as measuring
from ocsfast import ConfigError, LatencyTable, StateError
from ocsfast.cut.record import record_of

X = batch(0)[0]


@pytest.fixture
def clock(monkeypatch):
    """What attach measures with, in the place of the machine's clock."""
    made = []

    def of(device):
        assert device == torch.device("cpu")
        made.append(device)
        return lambda call: clocks[-1](call)

    clocks = [lambda call: 0.0]
    monkeypatch.setattr("ocsfast.api.latency.clock_for", of)

    def use(clock):
        clocks.append(clock)
        return made

    return use


@pytest.fixture(scope="module")
def table():
    model = net()
    return LatencyTable.measure(model, X, clock=WeightClock(model, rest=20_000))


def attached(model, ratio=0.5, **options):
    options = {"total_steps": 20 * EPOCH, **options}
    return ocsfast.attach(model, ratio, optimizer=sgd(model), example_inputs=X, **options)


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_the_time_asked_for_goes(clock, ratio, caplog):
    model = net()
    clock(WeightClock(model))
    dense = EACH * weights_of(model)
    caplog.set_level(logging.INFO, "ocsfast")
    pruner = attached(model, ratio, target="latency")
    report = pruner.cut()
    assert (report.unit, report.cost_dense) == ("nanoseconds", dense)
    assert report.cost <= (1 - ratio) * dense
    assert report.cost == pytest.approx(EACH * weights_of(model), rel=1e-4)  # predicted, and met
    assert report.cost > (1 - ratio - 0.06) * dense
    assert f"of {dense / 1e6:.3g} ms is gone" in caplog.text
    assert f"{report.cost / 1e6:.3g} ms stay" in caplog.text
    assert record_of(model)["dense"]["latency"] == dense
    assert record_of(model)["left"]["latency"] == report.cost


def test_one_line_measures_the_batch_that_it_saw(clock):
    model = net()
    made = clock(WeightClock(model))
    optimizer = sgd(model)
    for epoch in range(10):
        train(model, optimizer, EPOCH, first=epoch * EPOCH)
        report = ocsfast.step(model, 0.5, epochs=10, target="latency")
    assert report.stage == "pruned"
    assert report.unit == "nanoseconds"
    assert len(made) == 1
    assert ocsfast.step(model, 0.5, target="latency").cost == report.cost


def test_inspect_shows_milliseconds(clock):
    model = net()
    clock(WeightClock(model))
    found = ocsfast.inspect(model, X, 0.5, target="latency")
    assert found.latency == EACH * weights_of(model)
    assert found.latency_left <= found.latency / 2
    assert sum(f.latency for f in found.families) > found.latency / 2
    said = str(found)
    assert "ms" in said.splitlines()[0].split()
    assert f"{found.latency / 1e6:.3g} ms a batch" in said
    assert f"at ratio 0.5: {found.latency_left / 1e6:.3g} ms, " in said
    assert ocsfast.inspect(model, X).latency is None


def test_a_ratio_that_cannot_be_reached_says_so_in_milliseconds(table):
    dense = f"{table.dense / 1e6:.3g} ms"
    with pytest.raises(ConfigError, match=rf"at most 0\.\d+ of {dense} can go"):
        attached(net(), 0.9, target=table)


def test_a_resumed_run_goes_on_with_the_same_integers(clock):
    model = net()
    clock(WeightClock(model))
    optimizer = sgd(model)
    pruner = ocsfast.attach(
        model, 0.5, optimizer=optimizer, example_inputs=X, total_steps=20 * EPOCH, target="latency"
    )
    epochs(model, optimizer, pruner, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    epochs(model, optimizer, pruner, 12, first=4)
    assert pruner.stage == "pruned"

    other = net(seed=5)
    slower = WeightClock(other, rest=30_000)
    clock(lambda call: 2 * slower(call))  # another machine
    its = sgd(other)
    resumed = ocsfast.attach(
        other, 0.5, optimizer=its, example_inputs=X, total_steps=20 * EPOCH, target="latency"
    )
    assert resumed.state_dict()["latency"]["dense"] > pruner.state_dict()["latency"]["dense"]
    for part, state in zip((other, its, resumed), saved, strict=True):
        part.load_state_dict(state)
    epochs(other, its, resumed, 12, first=4)
    costs = [(r.cost, r.cost_at_cut, r.cost_dense) for r in pruner.history]
    assert [(r.cost, r.cost_at_cut, r.cost_dense) for r in resumed.history] == costs
    assert torch.equal(resumed.mask, pruner.mask)
    assert record_of(other) == record_of(model)
    assert torch.save(resumed.state_dict(), "/dev/null") is None


def test_a_state_of_another_target_is_refused(table):
    plain, timed = attached(net()), attached(net(), target=table)
    with pytest.raises(StateError, match="the state is of target='flops', here it is 'latency'"):
        timed.load_state_dict(plain.state_dict())
    with pytest.raises(StateError, match="the state is of target='latency', here it is 'flops'"):
        plain.load_state_dict(timed.state_dict())
    spoilt = {**timed.state_dict(), "latency": None}
    with pytest.raises(StateError, match="the state's latency table cannot be used"):
        timed.load_state_dict(spoilt)


def test_cut_again_by_the_table_of_the_dense_model(table):
    model = net()
    first = attached(model, 0.3, target=table).cut()
    ocsfast.detach(model)
    second = attached(model, 0.5, target=table, again=True).cut()
    assert first.cost_dense == second.cost_dense == table.dense
    assert second.cost <= table.dense / 2 < first.cost


def test_cut_again_by_what_the_cut_model_takes(clock, table):
    model = net()
    clock(WeightClock(model))
    attached(model, 0.3, target="latency").cut()
    left, dense = (record_of(model)[part]["latency"] for part in ("left", "dense"))
    ocsfast.detach(model)
    pruner = attached(model, 0.5, target="latency", again=True)
    assert pruner.cut().cost_dense == pytest.approx(dense, rel=1e-3)
    assert record_of(model)["left"]["latency"] <= dense / 2 < left

    other = net()
    attached(other, 0.3).cut()
    ocsfast.detach(other)
    clock(WeightClock(other))
    with pytest.raises(ConfigError, match="how long that took is not known"):
        attached(other, 0.5, target="latency", again=True)
    assert attached(other, 0.5, target=table, again=True).cut().cost_dense == table.dense


class Softer(Net):
    """Another activation."""

    def forward(self, x):
        x = self.pool(F.gelu(self.bn2(self.conv2(F.gelu(self.bn1(self.conv1(x)))))))
        return self.fc2(F.gelu(self.fc1(x.flatten(1))))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Net((9, 12, 10)), "it has 8 indices along dim 0 of tensor 1 of aten.conv2d"),
        (Softer, "it has aten.relu.default as relu, where the model calls nothing"),
    ],
)
def test_a_table_of_another_model_changes_nothing(table, build, said):
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match="target= is a latency table of another model: " + said):
        attached(model, target=table)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert attached(model).stage == "observe"  # nothing is in the way of another target


def test_a_table_that_lacks_a_layer(table):
    lacking = table.plain()
    gone = next(e for e in lacking["entries"] if e["nodes"] == ["conv2d_1"])
    lacking["entries"].remove(gone)
    lacking["rest"] += gone["nanoseconds"][-1][-1]
    with pytest.raises(ConfigError, match=r"no times of aten.conv2d.* in conv2"):
        attached(net(), target=LatencyTable.from_plain(lacking))


def test_a_narrower_model_that_was_never_cut_is_another(table):
    with pytest.raises(ConfigError, match="it is wider than this one, which was not cut"):
        attached(Net((6, 12, 10)), 0.2, target=table)


def test_times_that_do_not_sum_to_the_whole(table):
    wrong = {**table.plain(), "dense": table.dense + 7}
    with pytest.raises(ConfigError, match=f"dense is {table.dense + 7}, but .* sum to {table.dense}"):
        LatencyTable.from_plain(wrong)


def test_less_may_go_than_was_measured_but_not_more(table):
    assert attached(net(), 0.2, target=table, keep="fc1").cut().cost <= 0.8 * table.dense
    model = net()
    narrow = LatencyTable.measure(model, X, clock=WeightClock(model), keep=("conv1", "bn1"))
    with pytest.raises(ConfigError, match=r"more of the model may go than .* conv1 was taken to stay"):
        attached(net(), target=narrow)


def test_without_a_batch_there_is_nothing_to_measure(table):
    model = net()
    families = ocsfast.group(model, X)
    optimizer = sgd(model)
    with pytest.raises(StateError, match=r"table = ocsfast\.LatencyTable\.measure"):
        ocsfast.attach(model, 0.5, optimizer=optimizer, families=families, target="latency")
    pruner = ocsfast.attach(
        model, 0.5, optimizer=optimizer, families=families, target=table, total_steps=9
    )
    assert pruner.cut().cost <= table.dense / 2


def test_latency_is_no_sum_of_counts():
    with pytest.raises(ConfigError, match="'latency' is not one of flops, params, bytes"):
        ocsfast.Config(target={"flops": 1, "latency": 1})
    with pytest.raises(ConfigError, match="use one of flops, params, bytes, latency"):
        ocsfast.Config(target="time")


def replicated(rank):
    """Rank 0 measures, and both prune by its numbers."""
    model = smooth()
    ddp = DistributedDataParallel(model)
    measuring.clock_for = lambda device: WeightClock(model, rest=rank)
    pruner = ocsfast.attach(
        ddp, 0.5, optimizer=sgd(model), example_inputs=X, target="latency", total_steps=40
    )
    same_everywhere((pruner.cut().cost, pruner.state_dict()["latency"]))

    def fails(device):
        assert rank == 0
        return lambda call: -1.0

    measuring.clock_for = fails
    other = smooth()
    again = DistributedDataParallel(other)
    with pytest.raises(StateError, match="the clock said"):
        ocsfast.attach(
            again, 0.5, optimizer=sgd(other), example_inputs=X, target="latency", total_steps=40
        )


def test_rank_0_measures_for_all(ranks):
    ranks(replicated)


def fully_sharded(rank, saved):
    model, families = sharded()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    given = {"optimizer": optimizer, "families": families, "total_steps": 40}
    with pytest.raises(StateError, match="before it is sharded"):
        ocsfast.attach(model, 0.5, target="latency", **given)
    told = LatencyTable.from_plain(saved)
    with pytest.raises(StateError, match="drifted apart: latency of rank 1"):
        ocsfast.attach(
            model, 0.5, target=replace(told, rest=told.rest + rank, dense=told.dense + rank), **given
        )
    report = ocsfast.attach(model, 0.5, target=told, **given).cut()
    assert report.cost <= told.dense / 2
    same_everywhere(report.cost)


def test_a_sharded_model_is_cut_by_a_table_from_before(ranks):
    model = smooth()
    ranks(fully_sharded, LatencyTable.measure(model, X, clock=WeightClock(model)).plain())


def test_a_file_remembers_the_latency(table, tmp_path):
    model = net()
    report = attached(model, target=table).cut()
    ocsfast.save(model, str(tmp_path / "cut.safetensors"))
    loaded = net()
    ocsfast.load(loaded, str(tmp_path / "cut.safetensors"))
    train(loaded, sgd(loaded), 1)
    for target in (table, "latency"):
        said = ocsfast.step(loaded, 0.5, target=target)
        assert (said.cost, said.cost_dense, said.unit) == (report.cost, table.dense, "nanoseconds")
