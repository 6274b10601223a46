"""Checks between two calls of `step`: as many in every run, however long its epochs are."""

import pytest
import torch
from helpers.networks import batch, net, sgd, train
from helpers.runs import run

import ocsfast
from ocsfast import StateError

STEPS = 600  # of a run, so that a check comes every third


def drive(apart, options=None, stop=STEPS, state=None):
    """A run whose epochs are `apart` steps: its model, its pruner, and the step of the cut."""
    model, optimizer, pruner = run(
        **{"total_steps": STEPS, "check_every": "auto", "max_residual": 0.5, **(options or {})}
    )
    begun = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        pruner.load_state_dict(state["pruner"])
        begun = pruner.steps
    for step in range(begun, stop):
        train(model, optimizer, 1, first=step)
        if (step + 1) % apart == 0 and pruner.step().cut:
            return model, optimizer, pruner, step + 1
    return model, optimizer, pruner, None


def test_when_checks_come_does_not_depend_on_the_epochs():
    runs = [drive(apart) for apart in (1, 10, 40)]
    begins = [pruner._state.progress.start for _, _, pruner, _ in runs]
    assert len(set(begins)) == 1
    assert begins[0] % 3 == 0
    choices = [[r.cost_at_cut for r in pruner.history][: begins[0] // 3] for _, _, pruner, _ in runs]
    assert choices[0] == choices[1] == choices[2]
    first, second, third = (cut for *_, cut in runs)
    assert second == -(-first // 10) * 10  # the next call after it was found due
    assert third == -(-first // 40) * 40
    assert all(pruner.history[-1].cut and not pruner.history[-1].forced for _, _, pruner, _ in runs)


def test_no_check_cuts_between_two_calls():
    model, optimizer, pruner, _ = drive(40, stop=1)
    for step in range(1, STEPS):
        train(model, optimizer, 1, first=step)
        if pruner._state.progress.waits:
            break
    train(model, optimizer, 7)
    assert (pruner.stage, model.conv2.out_channels) == ("sparsify", 12)
    assert pruner.step().cut
    assert model.conv2.out_channels < 12


def test_a_run_of_unknown_length_checks_in_calls_alone():
    _, _, pruner, _ = drive(10, {"total_steps": None}, stop=60)
    assert len(pruner.history) == 6
    # Of so many calls it is known once the first has come: 20 of them, of 10 steps each.
    _, _, pruner, _ = drive(10, {"total_steps": None, "epochs": 60, "sparsify_from": 99}, stop=40)
    assert [r.check for r in pruner.history] == list(range(1, 12))


def test_captured_steps_check_in_calls_alone():
    _, _, pruner, _ = drive(10, {"capturable": True}, stop=30)
    assert len(pruner.history) == 3


def test_no_step_is_checked_twice():
    """Where a call follows every step, the call makes the check, and cuts with it."""
    _, _, pruner, _ = drive(1)
    steps = [report.steps for report in pruner.history]
    assert steps == sorted(set(steps))
    assert pruner.history[-1].cut


def by_epochs(count):
    model, optimizer, pruner = run(total_steps=None, epochs=count, check_every="auto")
    return model, optimizer, pruner


def test_a_longer_plan_of_a_resumed_run_counts_from_its_first_step():
    model, optimizer, pruner = by_epochs(10)
    train(model, optimizer, 20)
    pruner.step()
    state = pruner.state_dict()
    other, others, resumed = by_epochs(100)
    other.load_state_dict(model.state_dict())
    others.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(state)
    for epoch in range(1, 11):
        train(other, others, 20, first=20 * epoch)
        assert resumed.step().stage == ("observe" if epoch < 9 else "sparsify"), epoch
    progress = resumed._state.progress
    assert (progress.start, progress.planned) == (200, 400)


def test_what_goes_wrong_is_said_by_the_next_call():
    model, optimizer, pruner, _ = drive(40, stop=2)
    weight = model.conv2.weight.detach().clone()
    with torch.no_grad():
        model.conv2.weight.fill_(float("nan"))
    train(model, optimizer, 4)
    assert len(pruner.history) == 0
    with pytest.raises(StateError, match="holds NaN"):
        pruner.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_(0.1)
        for buffer in model.buffers():
            buffer.nan_to_num_(1.0)
        model.conv2.weight.copy_(weight)
        optimizer.state.clear()
    assert pruner.step().check == 1


@pytest.mark.parametrize("stop", [20, 25, 50])
def test_resumed_in_the_middle_of_an_epoch(stop):
    model, optimizer, pruner, _ = drive(40, stop=stop)
    parts = (("model", model), ("optimizer", optimizer), ("pruner", pruner))
    state = {name: part.state_dict() for name, part in parts}
    one, _, first, cut = drive(40)
    two, _, second, again = drive(40, state=state)
    assert again == cut
    assert [r.cost_at_cut for r in second.history] == [r.cost_at_cut for r in first.history]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_call_by_the_paper_is_a_check():
    model = net()
    optimizer = sgd(model)
    for epoch in range(4):
        train(model, optimizer, 5, first=5 * epoch)
        report = ocsfast.step(
            model, 0.5, example_inputs=batch(0)[0], config=ocsfast.Config.paper("cifar", total_steps=600)
        )
    assert report.check == 4
