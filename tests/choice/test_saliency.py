"""Runs by each criterion, what it needs, and one of a user's own."""

import pytest
import torch
from helpers.networks import EPOCH, epochs, train
from helpers.runs import run

from ocsfast import StateError
from ocsfast.core.criteria import CRITERIA


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_every_criterion_prunes(name, criterion):
    if (name, criterion) == ("SGD", "obd_state"):
        pytest.skip("SGD keeps no average of squared gradients")
    model, optimizer, pruner = run(name, criterion=criterion)
    reports = epochs(model, optimizer, pruner, 14)  # gradients are there: train() zeroes them before
    assert reports[-1].stage == "pruned"
    assert reports[-1].cost <= reports[-1].cost_dense // 2


@pytest.mark.parametrize(
    "criterion", [name for name, formula in CRITERIA.items() if formula.x == "gradient"]
)
def test_a_criterion_without_gradients_says_what_to_do(criterion):
    model, optimizer, pruner = run(criterion=criterion)
    train(model, optimizer, EPOCH)
    optimizer.zero_grad()
    told = rf"call ocsfast\.step before optimizer\.zero_grad\(\), or use criterion='{criterion}_state'"
    with pytest.raises(StateError, match=told):
        pruner.step()
    train(model, optimizer, EPOCH)
    pruner.step()


@pytest.mark.parametrize(
    ("name", "criterion", "told"),
    [
        ("SGD plain", "taylor_state", "needs momentum_buffer or exp_avg .* SGD with momentum, or Adam,"),
        ("SGD", "obd_state", "needs exp_avg_sq or square_avg .* train with Adam or RMSprop,"),
    ],
)
def test_a_criterion_without_what_it_needs_says_who_has_it(name, criterion, told):
    model, optimizer, pruner = run(name, criterion=criterion)
    train(model, optimizer, EPOCH)
    with pytest.raises(StateError, match=told):
        pruner.step()


def test_a_criterion_may_be_ones_own():
    calls = []

    def magnitude(weight, grad, state):
        calls.append((grad is not None, "momentum_buffer" in state))
        return weight.abs()

    model, optimizer, pruner = run(criterion=magnitude)
    other, others, twin = run(criterion="l1")
    for m, o, p in ((model, optimizer, pruner), (other, others, twin)):
        train(m, o, EPOCH)
        p.step()
    assert set(calls) == {(True, True)}
    torch.testing.assert_close(pruner.scores, twin.scores)
    wrong = run(criterion=lambda weight, grad, state: weight.sum())
    train(*wrong[:2], EPOCH)
    with pytest.raises(StateError, match=r"gave torch.Size\(\[\]\) for conv1.weight of shape"):
        wrong[2].step()


@pytest.mark.parametrize(("criterion", "name"), [("obd_state", "AdamW"), ("taylor_state", "SGD")])
def test_groups_do_not_score_higher_for_being_marked(criterion, name):
    # Eq. 8 would be part of what these criteria read: marked groups left the mask, and others came.
    ever, left = {}, {}
    for penalty in ("auto", "both"):
        options = {"max_residual": 1e-9, "deadline": None, "sparsify_from": 5, "nats": 6.0}
        model, optimizer, pruner = run(name, criterion=criterion, penalty=penalty, **options)
        marked = []
        while pruner.stage != "pruned" and len(pruner.history) < 14:
            train(model, optimizer, EPOCH)
            report = pruner.step()
            if report.stage == "sparsify":
                marked.append(pruner.mask.clone())
        first, scores = marked[0], pruner.scores
        left[penalty] = float(scores[first].mean() / scores[~first].mean())  # of what was marked first
        ever[penalty] = float(torch.stack(marked).any(0).float().mean())
    assert left["auto"] < 0.2
    assert ever["auto"] < ever["both"]
