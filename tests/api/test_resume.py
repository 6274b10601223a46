"""Weights of a cut model arrive in a dense one, in whatever order a framework restores things."""

import ast
import copy
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers.networks import EPOCH, Net, batch, epochs, net, sgd
from helpers.runs import attach, run
from torch import nn

import ocsfast
from ocsfast import StateError
from ocsfast.cut.fitting import surplus
from ocsfast.grouping.engines import group
from ocsfast.train.models import build_model


def started(model, optimizer, **options):
    return attach(model, optimizer, **{"total_steps": 20 * EPOCH, **options})


def saved(epoch):
    """What a run's checkpoint holds after `epoch` epochs, and the run itself."""
    model = net()
    optimizer = sgd(model)
    pruner = started(model, optimizer)
    epochs(model, optimizer, pruner, epoch)
    parts = {"model": model, "optimizer": optimizer, "pruner": pruner}
    return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}, parts


ORDERS = [
    ("model", "optimizer", "pruner"),  # Accelerate, Lightning, transformers
    ("pruner", "model", "optimizer"),
    ("optimizer", "pruner", "model"),
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("stop", [4, 14])
def test_any_order_ends_the_same_to_the_bit(order, stop):
    state, run = saved(stop)
    assert run["pruner"].stage == ("observe" if stop == 4 else "pruned")
    epochs(run["model"], run["optimizer"], run["pruner"], 3, first=stop)

    model = net(seed=5)
    optimizer = sgd(model)
    parts = {"model": model, "optimizer": optimizer, "pruner": started(model, optimizer)}
    for name in order:
        parts[name].load_state_dict(state[name])
    assert parts["pruner"].stage == state["pruner"]["progress"]["stage"]
    epochs(model, optimizer, parts["pruner"], 3, first=stop)
    for key, value in run["model"].state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    assert parts["pruner"].steps == run["pruner"].steps
    assert model.conv1.out_channels == run["model"].conv1.out_channels


def test_the_scheduler_tells_a_resumed_run_the_same_length():
    def with_schedule(seed):
        model = net(seed)
        optimizer = sgd(model)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16)
        return model, optimizer, scheduler, started(model, optimizer, total_steps=None)

    def go(run, count, first=0):
        for e in range(first, first + count):
            epochs(run[0], run[1], run[3], 1, first=e)
            run[2].step()

    whole = with_schedule(0)
    go(whole, 4)
    states = [copy.deepcopy(part.state_dict()) for part in whole]
    other = with_schedule(3)
    for part, state in zip(other, states, strict=True):
        part.load_state_dict(state)
    go(whole, 12, first=4)
    go(other, 12, first=4)
    assert other[3].t_cut == whole[3].t_cut
    for key, value in whole[0].state_dict().items():
        assert torch.equal(value, other[0].state_dict()[key])


def test_a_model_inside_another_takes_its_part():
    state, run = saved(14)
    model = net(seed=5)
    started(model, sgd(model))
    outer = nn.ModuleDict({"net": model, "head": nn.Linear(2, 2)})
    arriving = {f"net.{key}": value for key, value in state["model"].items()}
    outer.load_state_dict({**arriving, **outer["head"].state_dict(prefix="head.")})
    assert model.conv2.weight.shape == run["model"].conv2.weight.shape
    model(batch(0)[0])


def test_shapes_of_no_cut_are_refused_and_nothing_changes():
    state, _ = saved(14)
    model = net(seed=5)
    optimizer = sgd(model)
    pruner = started(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    wider = Net((8, 12, 11)).state_dict()
    with pytest.raises(StateError, match=r"fc1\.weight arrives with 11 indices along axis 0"):
        model.load_state_dict(wider)
    uneven = {**state["model"], "fc1.weight": state["model"]["fc1.weight"][:, 1:]}
    with pytest.raises(StateError, match=r"fc1\.weight arrives with .* along axis 1"):
        model.load_state_dict(uneven)
    assert pruner.stage == "observe"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_dense_weights_for_a_cut_model_are_known_for_what_they_may_be():
    model = net()
    ocsfast.fit_on_load(model, batch(0)[0])
    dense = copy.deepcopy(model.state_dict())
    narrower = Net((8, 12, 9)).state_dict()
    model.load_state_dict(narrower)
    with pytest.raises(
        StateError, match=r"fc1\.weight arrives with 10 .* or of this one before it was cut"
    ):
        model.load_state_dict(dense)
    uneven = {**narrower, "fc1.bias": narrower["fc1.bias"][1:]}
    with pytest.raises(StateError, match=r"of another model$"):
        model.load_state_dict(uneven)


def test_state_and_weights_of_different_moments_are_refused():
    early, _ = saved(4)
    late, _ = saved(14)
    model = net(seed=5)
    pruner = started(model, sgd(model))
    model.load_state_dict(late["model"])
    last = late["pruner"]["progress"]["history"][-1]
    assert (pruner.stage, ocsfast.step(model, 0.5).cost) == ("pruned", last["cost"])
    with pytest.raises(StateError, match="from before the cut"):
        pruner.load_state_dict(early["pruner"])
    other = copy.deepcopy(late["pruner"])
    other["mask"][other["mask"].int().argmax()] = False  # one group more is left
    with pytest.raises(StateError, match="different cuts"):
        pruner.load_state_dict(other)
    pruner.load_state_dict(late["pruner"])
    assert pruner.t_cut == late["pruner"]["progress"]["t_cut"]


def test_hooks_go_with_the_pruner_and_do_not_travel():
    model = net()
    optimizer = sgd(model)
    started(model, optimizer)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.load_state_dict(model.state_dict())
    ocsfast.detach(model)
    assert not model._load_state_dict_pre_hooks


def grouped(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)),
    )


def transformer(seed):
    torch.manual_seed(seed)
    return build_model("vit_tiny", 5, 3, 8)


@pytest.mark.parametrize("make", [grouped, transformer])
def test_sizes_that_no_shape_shows(make):
    """Groups of a convolution, heads of an attention: they follow from how many are left."""
    model, x = make(0), batch(0)[0]
    families = group(model, (x,), {})
    pruned = torch.zeros(families.num_groups, dtype=torch.bool)
    for f, family in enumerate(families.families):
        pruned[family.first : family.first + 1 + f % (family.size - 1)] = True
    ocsfast.cut_model(model, families, pruned)
    other = make(1)
    ocsfast.fit_on_load(other, x)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert repr(other) == repr(model)


def test_a_saved_model_needs_none_of_the_code_that_trains(tmp_path):
    _, run = saved(14)
    ocsfast.save(run["model"], tmp_path / "pruned")
    script = """
        import sys, torch, ocsfast
        from helpers.networks import Net
        model = Net()
        ocsfast.load(model, sys.argv[1])
        print(model.eval()(torch.ones(1, 3, 8, 8)).tolist())
        unwanted = {"ocsfast.train", "ocsfast.integrations.run", "torchvision", "sklearn"}
        assert not unwanted & set(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "pruned")],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    here = run["model"].eval()(torch.ones(1, 3, 8, 8))
    torch.testing.assert_close(torch.tensor(ast.literal_eval(done.stdout)), here)


def test_kept_counts_follow_from_shapes():
    model = net()
    families = group(model, (batch(0)[0],), {})
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert surplus(families, shapes) is None
    smaller = {name: value.shape for name, value in Net((5, 7, 2)).state_dict().items()}
    pruned = surplus(families, smaller)
    assert [int((~pruned[f.first : f.first + f.size]).sum()) for f in families.families] == [5, 7, 2]
    some = {"conv2.weight": smaller["conv2.weight"]}  # the rest is not there
    assert int(surplus(families, some).sum()) == 3 + 5


@pytest.mark.parametrize("stop", [3, 9, 14])
def test_a_resumed_run_is_the_same_run(stop, tmp_path):
    model, optimizer, pruner = run()
    epochs(model, optimizer, pruner, stop)
    torch.save(
        {"pruner": pruner.state_dict(), "model": model.state_dict(), "opt": optimizer.state_dict()},
        tmp_path / "state",
    )
    epochs(model, optimizer, pruner, 16 - stop, first=stop)

    state = torch.load(tmp_path / "state", weights_only=True)
    other, other_optimizer, resumed = run(seed=3)
    resumed.load_state_dict(state["pruner"])
    other.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["opt"])
    epochs(other, other_optimizer, resumed, 16 - stop, first=stop)
    assert (resumed.t_sl, resumed.t_cut, resumed.steps) == (pruner.t_sl, pruner.t_cut, pruner.steps)
    assert torch.equal(resumed.mask, pruner.mask)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    plain = [(r.check, r.stage, r.stability, r.nats) for r in pruner.history]
    assert [(r.check, r.stage, r.stability, r.nats) for r in resumed.history] == plain


def test_a_state_that_does_not_fit_changes_nothing():
    model, optimizer, pruner = run()
    epochs(model, optimizer, pruner, 2)
    good = pruner.state_dict()
    _, _, other = run(ratio=0.4)
    bad = [
        ({}, "not a pruner's state"),
        (other.state_dict(), "ratio=0.4"),
        (run(lag=1)[2].state_dict(), "lag=1, here it is 2"),
        ({**good, "facts": {**good["facts"], "processes": 4}}, "processes=4, here it is 1"),
        ({**good, "version": 9}, "version 9"),
        ({**good, "facts": {**good["facts"], "families": [["x", 3]]}}, "another model"),
        ({**good, "facts": {}}, "what it is of"),
        ({**good, "mask": good["mask"][1:]}, "do not fit"),
        ({**good, "mask": good["mask"].float()}, "not boolean"),
        ({**good, "progress": {**good["progress"], "stage": "lunch"}}, "not a pruner's state"),
        ({**good, "progress": {**good["progress"], "steps": "x"}}, "not a pruner's state"),
        ({**good, "progress": {**good["progress"], "history": [{"a": 1}]}}, "not a pruner's state"),
    ]
    for state, said in bad:
        with pytest.raises(StateError, match=said):
            pruner.load_state_dict(state)
    assert pruner.state_dict()["progress"] == good["progress"]
