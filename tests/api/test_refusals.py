"""What `step` and `attach` refuse, in one clear sentence and before anything changes."""

import copy

import pytest
import torch
from helpers.networks import EPOCH, Net, batch, net, sgd, train
from torch import nn

import ocsfast
from ocsfast import ConfigError, GroupingError, StateError


def unchanged(model, optimizer):
    """A function that asserts that nothing has been touched since."""
    before = copy.deepcopy(model.state_dict())
    hooks = len(model._forward_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    mode = model.training

    def check():
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert hooks == (len(model._forward_pre_hooks), len(optimizer._optimizer_step_post_hooks))
        assert model.training is mode

    return check


@pytest.mark.parametrize("wrong", ["sgd", net().parameters()])
def test_what_is_no_optimizer_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"one torch\.optim\.Optimizer is expected"):
        ocsfast.attach(net(), 0.5, optimizer=wrong, example_inputs=batch(0)[0])


@pytest.mark.parametrize("ratio", [0, 1, 1.5, -1, float("nan"), "0.5"])
def test_a_bad_ratio_is_refused(ratio):
    model = net()
    optimizer = sgd(model)
    train(model, optimizer, 2)
    check = unchanged(model, optimizer)
    with pytest.raises(ConfigError, match="ratio"):
        ocsfast.step(model, ratio)
    with pytest.raises(ConfigError, match="ratio"):
        ocsfast.attach(model, ratio, optimizer=optimizer, example_inputs=batch(0)[0])
    check()


def test_ratio_and_options_cannot_change():
    model = net()
    optimizer = sgd(model)
    for call in range(2):
        train(model, optimizer, 2, first=call)
        ocsfast.step(model, 0.5, tau=0.01)
        with pytest.raises(ConfigError, match=r"ratio=0\.6 differs from ratio=0\.5"):
            ocsfast.step(model, 0.6, tau=0.01)
        with pytest.raises(ConfigError, match="tau: not as in the first call"):
            ocsfast.step(model, 0.5, tau=0.02)
    ocsfast.step(model, 0.5)


def test_a_call_before_any_training_step_is_refused():
    model = net()
    optimizer = sgd(model)
    check = unchanged(model, optimizer)
    with pytest.raises(StateError, match="no optimizer step has been seen"):
        ocsfast.step(model, 0.5)
    with pytest.raises(StateError, match="has taken no step yet"):
        ocsfast.step(model, 0.5, optimizer=optimizer, example_inputs=batch(0)[0])
    with pytest.raises(StateError, match="no optimizer step has been seen"):
        ocsfast.attach(model, 0.5, example_inputs=batch(0)[0])
    with pytest.raises(StateError, match="attach needs example_inputs="):
        ocsfast.attach(model, 0.5, optimizer=optimizer)
    check()


def test_a_call_before_any_forward_pass_is_refused():
    model = net()
    optimizer = sgd(model)
    train(model, optimizer, 1)
    ocsfast.step(model, 0.5)
    with pytest.raises(StateError, match="no forward pass"):
        ocsfast.step(model, 0.5)


def test_two_owners_or_none_are_refused():
    model = net()
    first, second = sgd(model), torch.optim.Adam(model.parameters())
    train(model, first, 1)
    train(model, second, 1)
    with pytest.raises(StateError, match="2 optimizers own parameters"):
        ocsfast.step(model, 0.5)
    ocsfast.step(model, 0.5, optimizer=second, example_inputs=batch(0)[0])
    stranger = sgd(net())
    other = net()
    check = unchanged(other, stranger)
    with pytest.raises(StateError, match=r"conv1\.weight and 9 more are to be pruned"):
        ocsfast.attach(other, 0.5, optimizer=stranger, example_inputs=batch(0)[0])
    check()


def test_an_optimizer_that_took_over_is_refused():
    model = net()
    optimizer = sgd(model)
    ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=batch(0)[0])
    train(model, optimizer, EPOCH)
    ocsfast.step(model, 0.5)
    train(model, new := sgd(model), EPOCH)
    with pytest.raises(StateError, match="driven by another optimizer"):
        ocsfast.step(model, 0.5)
    assert new is not optimizer


def test_an_optimizer_that_cannot_be_cut_is_refused():
    model = net()

    class Sketched(torch.optim.Adam):
        pass

    optimizer = Sketched(model.parameters())
    train(model, optimizer, 2)
    optimizer.state[model.fc1.weight]["sketch"] = torch.zeros(3)
    check = unchanged(model, optimizer)
    with pytest.raises(StateError, match="Sketched cannot be cut: its state 'sketch'"):
        ocsfast.attach(model, 0.5, example_inputs=batch(0)[0])
    check()


def test_a_model_of_which_nothing_can_go_is_refused():
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = sgd(model)
    check = unchanged(model, optimizer)
    with pytest.raises(GroupingError) as refused:
        ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=torch.randn(2, 4))
    check()
    said = "nothing in this model can be pruned: 1 layer stays dense: 1 model output. 0: model output"
    assert str(refused.value) == said


def test_a_ratio_out_of_reach_says_what_stays_and_why():
    """How many layers stay for which reason; and of the ways out, those that apply."""
    model = net()
    for name in ("conv1", "bn1"):
        model.get_submodule(name).requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def said(kind=ConfigError, ratio=0.9, **options):
        with pytest.raises(kind) as refused:
            ocsfast.attach(model, ratio, optimizer=optimizer, example_inputs=batch(0)[0], **options)
        return str(refused.value)

    frozen = (
        "unfreeze them, or call ocsfast.step only from the epoch in which they train (to resume a run, "
        "attach before they are frozen)"
    )
    alone = said()
    assert "as 2 layers stay dense: 1 frozen (requires_grad=False), 1 model output. Lower" in alone
    assert alone.endswith(f"Lower the ratio, or {frozen}")  # no max_family_ratio would reach it
    both = said(keep=["fc2"], max_family_ratio=1.0)
    assert "as 3 layers stay dense: 1 frozen (requires_grad=False), 1 held by keep=, 1 model" in both
    assert both.endswith(f"Lower the ratio, {frozen}, or shorten keep=")
    model.requires_grad_(False)
    nothing = said(GroupingError, 0.1)
    assert "4 layers stay dense: 3 frozen (requires_grad=False), 1 model output. conv1: req" in nothing
    assert nothing.endswith(f"To prune it, {frozen}")


def test_inputs_of_another_shape_are_refused():
    model = net()
    optimizer = sgd(model)
    check = unchanged(model, optimizer)
    with pytest.raises(GroupingError):
        ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=torch.randn(2, 7, 8, 8))
    check()


def test_integer_and_complex_parameters_are_refused():
    for extra in (
        nn.Parameter(torch.arange(3), requires_grad=False),
        nn.Parameter(torch.zeros(3, dtype=torch.complex64)),
    ):
        model = net()
        model.extra = extra
        optimizer = sgd(model)
        check = unchanged(model, optimizer)
        with pytest.raises(GroupingError, match="extra is"):
            ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=batch(0)[0])
        check()


def test_wrapped_models_are_refused():
    class DistributedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    class FullyShardedDataParallel(DistributedDataParallel):
        pass

    sharded = type("FSDPNet", (Net, type("FSDPModule", (), {})), {})()
    cases = [
        (nn.Sequential(DistributedDataParallel(net())), "its part 0 is a DistributedDataParallel"),
        (FullyShardedDataParallel(net()), r"use torch\.distributed\.fsdp\.fully_shard"),
        (sharded, r"families = ocsfast\.group\(model"),
    ]
    for model, said in cases:
        with pytest.raises(StateError, match=said):
            ocsfast.step(model, 0.5)
    with pytest.raises(ConfigError, match=r"an nn\.Module is expected"):
        ocsfast.step("model", 0.5)
