"""The state machine on a small network: stages, penalty, deadline, resuming, determinism."""

import gc
import weakref

import pytest
import torch
from helpers.builders import comparison
from helpers.networks import EPOCH, OPTIMIZERS, batch, epochs, net, sgd, train
from helpers.runs import attach, run
from torch import nn

import ocsfast
from ocsfast import ConfigError, StateError
from ocsfast.grouping.macs import count_macs
from ocsfast.ops.plan import FACTS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_whole_run_passes_all_stages_and_cuts_once(name):
    model, optimizer, pruner = run(name)
    names = [id(p) for p in model.parameters()]
    reports = epochs(model, optimizer, pruner, 20)
    stages = [r.stage for r in reports]
    assert stages == sorted(stages, key=["observe", "sparsify", "pruned"].index)
    assert stages[-1] == pruner.stage == "pruned"
    cut = next(r for r in reports if r.cut)
    assert sum(r.cut for r in reports) == 1
    assert (pruner.t_cut, cut.check) == (cut.check, len(pruner.history))
    assert cut.cost == cut.cost_at_cut <= cut.cost_dense // 2
    assert reports[-1].cost == cut.cost
    assert [id(p) for p in model.parameters()] == names
    kept = {f: n for f, n, _ in cut.kept}
    assert kept["conv1"] == model.conv1.out_channels
    assert cut.kept_share()["conv1"] == model.conv1.out_channels / 8
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_the_predicted_cost_is_the_counted_one():
    model, optimizer, pruner = run()
    train(model, optimizer, 3)
    report = pruner.cut()
    assert count_macs(lambda: model.eval()(batch(0)[0][:1])) == report.cost
    assert report.forced
    assert report.cut


def test_the_same_seed_gives_the_same_bits():
    def once():
        model, optimizer, pruner = run()
        reports = epochs(model, optimizer, pruner, 14)
        return model.state_dict(), pruner.scores, pruner.mask, [(r.residual, r.nats) for r in reports]

    first, second = once(), once()
    assert all(torch.equal(v, second[0][k]) for k, v in first[0].items())
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])
    assert first[3] == second[3]


def test_nan_and_inf_name_the_tensor():
    for bad in (float("nan"), float("inf")):
        model, optimizer, pruner = run()
        epochs(model, optimizer, pruner, 2)
        before = pruner.state_dict()["progress"]
        train(model, optimizer, EPOCH)
        with torch.no_grad():
            model.conv2.weight[3, 1] = bad
        with pytest.raises(StateError, match=r"conv2\.weight holds NaN or infinite"):
            pruner.step()
        assert pruner.state_dict()["progress"]["history"] == before["history"]
        assert pruner.stage == "observe"
    ocsfast.detach(model)
    with pytest.raises(StateError, match=r"conv2\.weight holds NaN"):
        attach(model, sgd(model))


@pytest.mark.parametrize("stage", ["observe", "sparsify"])
def test_converted_and_moved_weights_are_planned_anew(stage):
    model, optimizer, pruner = run(sparsify_from=1 if stage == "sparsify" else 50)
    epochs(model, optimizer, pruner, 1)
    assert pruner.stage == stage
    model.to(memory_format=torch.channels_last)
    epochs(model, optimizer, pruner, 1, first=1)
    model.double()
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].double()
    epochs(model, optimizer, pruner, 1, first=2)
    assert pruner.scores.dtype == torch.float64
    assert len(pruner.history) == 3


def test_replaced_parameters_are_refused():
    model, optimizer, pruner = run()
    epochs(model, optimizer, pruner, 1)
    model.conv2.weight = nn.Parameter(model.conv2.weight.detach().clone())
    train(model, optimizer, EPOCH)
    with pytest.raises(StateError, match=r"conv2\.weight is not the parameter that was attached"):
        pruner.step()


def test_an_unreachable_ratio_names_the_largest():
    model = net()
    with pytest.raises(ConfigError) as error:
        attach(model, sgd(model), ratio=0.97)
    said = str(error.value)
    assert "ratio=0.97 cannot be reached: with max_family_ratio=0.75" in said
    most = float(said.split("at most ")[1].split()[0])
    ocsfast.detach(model)
    attach(model, sgd(model), ratio=most)
    other = net()
    with pytest.raises(ConfigError, match="cannot be reached"):
        attach(other, sgd(other), ratio=most + 0.001)


def test_no_family_loses_more_than_its_limit_and_kept_counts_are_round():
    model, optimizer, pruner = run(max_family_ratio=0.6, round_to=4, ratio=0.4)
    train(model, optimizer, 3)
    kept = {name: (n, size) for name, n, size in pruner.cut().kept}
    assert all(n % 4 == 0 or n == size for n, size in kept.values())
    assert all(n >= 0.4 * size for n, size in kept.values())


def test_a_pruner_may_be_cut_and_detached_by_hand():
    model, optimizer, pruner = run()
    train(model, optimizer, 2)
    assert pruner.cut().cut
    with pytest.raises(StateError, match="cut already"):
        pruner.cut()
    assert pruner.step().stage == "pruned"
    model, optimizer, pruner = run()
    pruner.detach()
    for call in (pruner.step, pruner.cut):
        with pytest.raises(StateError, match="detached"):
            call()
    assert not optimizer._optimizer_step_pre_hooks


def test_checks_may_run_in_inference_mode():
    """Validation loops leave it on; what is made in it could not be trained."""
    model = net()
    optimizer = sgd(model)
    for epoch in range(8):
        train(model, optimizer, EPOCH, first=EPOCH * epoch)
        with torch.inference_mode():
            report = ocsfast.step(model, 0.5, total_steps=8 * EPOCH)
    assert report.stage == "pruned"
    train(model, optimizer, 2)
    model, optimizer, pruner = run()
    train(model, optimizer, EPOCH)
    with torch.inference_mode():
        pruner.cut()
    train(model, optimizer, 2)


def test_a_parameter_that_the_example_does_not_use_is_said(caplog):
    model = net()
    model.extra = nn.Linear(3, 3)
    ocsfast.attach(model, 0.5, optimizer=sgd(model), example_inputs=batch(0)[0])
    (said,) = [r for r in caplog.records if "not used by the example" in r.message]
    assert said.levelname == "WARNING"
    assert "extra.weight" in said.message


def test_nothing_keeps_the_model_alive():
    model, optimizer, pruner = run()
    epochs(model, optimizer, pruner, 1)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    optimizer.step()
    with pytest.raises(StateError, match="no longer exists"):
        pruner.cut()


def test_jaccard_is_that_of_the_masks():
    model, optimizer, pruner = run()
    masks = []
    for e in range(4):
        train(model, optimizer, EPOCH, first=e * EPOCH)
        report = pruner.step()
        masks.append(pruner.mask.clone())
    plan = pruner._hooks.coupled.bound.plan
    assert report.stability == float(comparison(plan, masks[3], masks[1])()[FACTS.index("index")])
    assert report.changed == int((masks[2] != masks[3]).sum())
