"""The one line, as a user writes it."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from helpers.networks import EPOCH, batch, net, sgd, train
from torch import nn

import ocsfast
from ocsfast import Config, ConfigError, StateError


def by_one_line(model, epochs):
    """A loop with a schedule, and the one line after each epoch: its reports."""
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * EPOCH)
    reports = []
    for e in range(epochs):
        for k in range(EPOCH):
            train(model, optimizer, 1, first=e * EPOCH + k)
            scheduler.step()
        reports.append(ocsfast.step(model, 0.5))
    return reports


def test_the_one_line_is_enough():
    model = net()
    reports = by_one_line(model, 20)
    assert [r.check for r in reports[:3]] == [0, 1, 6]  # 200 in the run: here one a step
    assert reports[-1].stage == "pruned"
    assert sum(r.cut for r in reports) == 1
    assert 2 * reports[-1].cost <= reports[-1].cost_dense
    assert not model._forward_pre_hooks
    assert ocsfast.step(model, 0.5) == reports[-1]


def test_a_late_first_call_still_shrinks_before_the_cut():
    """One line, three epochs: the first call only listens, and the deadline is over at the second."""
    reports = by_one_line(net(), 3)
    assert [r.stage for r in reports] == ["observe", "sparsify", "pruned"]
    assert reports[-1].nats == pytest.approx(3.0, rel=0.1)


def test_it_may_stand_in_the_inner_loop():
    model = net()
    optimizer = sgd(model)
    checks = []
    for k in range(9):
        train(model, optimizer, 1, first=k)
        checks.append(ocsfast.step(model, 0.5, check_every=3).check)
    assert checks == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    other = net()
    optimizer = sgd(other)
    for k in range(9):
        train(other, optimizer, 1, first=k)
        assert ocsfast.step(other, 0.5).check == 0  # nothing tells the length: 500 apart


@pytest.mark.parametrize(
    "inputs", [batch(0)[0], (batch(0)[0],), [batch(0)[0]], {"x": batch(0)[0]}], ids=type
)
def test_with_example_inputs_it_attaches_at_once(inputs):
    model = net()
    train(model, sgd_kept := sgd(model), EPOCH)
    assert ocsfast.step(model, 0.5, example_inputs=inputs).check == 1
    assert sgd_kept._optimizer_step_post_hooks


def test_attach_may_come_ahead_of_the_loop():
    model = net()
    optimizer = sgd(model)
    pruner = ocsfast.attach(
        model, 0.5, optimizer=optimizer, example_inputs=batch(0)[0], config=Config(tau=0.1), lag=1
    )
    assert (pruner.config.tau, pruner.config.lag) == (0.1, 1)
    for e in range(3):
        train(model, optimizer, EPOCH, first=e * EPOCH)
        assert ocsfast.step(model, 0.5).check == e + 1
    with pytest.raises(StateError, match="has a pruner already"):
        ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=batch(0)[0])
    ocsfast.detach(model)
    ocsfast.detach(model)
    ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=batch(0)[0])


def test_a_training_run_is_not_disturbed_before_the_penalty():
    plain, watched = net(), net()
    a, b = sgd(plain), sgd(watched)
    for e in range(3):
        train(plain, a, EPOCH, first=e * EPOCH)
        train(watched, b, EPOCH, first=e * EPOCH)
        ocsfast.step(watched, 0.5)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), watched.parameters(), strict=True))


@pytest.mark.parametrize("calls", [1, 2])
def test_copies_and_pickles_are_plain_models(calls):
    model = net()
    optimizer = sgd(model)
    keys = list(model.state_dict())
    for e in range(calls):
        train(model, optimizer, EPOCH, first=e * EPOCH)
        ocsfast.step(model, 0.5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(other.state_dict()) == keys
        other(batch(0)[0])
        train(other, other_optimizer := sgd(other), 1)
        assert not other_optimizer._optimizer_step_post_hooks
        assert ocsfast.step(other, 0.3).check == 0  # a run of its own
    torch.save(optimizer.state_dict(), io.BytesIO())
    copy.deepcopy(optimizer)


def test_the_model_can_die():
    model = net()
    optimizer = sgd(model)
    for e in range(2):
        train(model, optimizer, EPOCH, first=e * EPOCH)
        ocsfast.step(model, 0.5)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_frozen_parameters_stay_as_they_are():
    model = net()
    model.conv1.requires_grad_(False)
    before = model.conv1.weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for e in range(12):
        train(model, optimizer, EPOCH, first=e * EPOCH)
        report = ocsfast.step(model, 0.4, total_steps=12 * EPOCH)
    assert report.stage == "pruned"
    assert torch.equal(model.conv1.weight, before)
    assert model.conv2.out_channels < 12


def test_a_compiled_model_is_unwrapped():
    model = net()
    compiled = torch.compile(model, backend="eager")
    optimizer = sgd(model)
    ocsfast.attach(compiled, 0.5, optimizer=optimizer, example_inputs=batch(0)[0], total_steps=60)
    for e in range(12):
        train(compiled, optimizer, EPOCH, first=e * EPOCH)
        report = ocsfast.step(compiled, 0.5)
    assert report.stage == "pruned"
    x = batch(0)[0]
    torch.testing.assert_close(compiled.eval()(x), model.eval()(x))


def test_what_is_kept_is_not_pruned():
    model = net()
    optimizer = sgd(model)
    pruner = ocsfast.attach(
        model, 0.3, optimizer=optimizer, example_inputs=batch(0)[0], keep=[model.conv1, "fc2"]
    )
    assert [f.name for f in pruner.families.families] == ["conv2"]
    ocsfast.detach(model)
    with pytest.raises(ConfigError, match="keep='fc9'"):
        ocsfast.attach(model, 0.3, optimizer=optimizer, example_inputs=batch(0)[0], keep="fc9")


def test_accumulated_gradients_and_a_scaler_are_counted_by_steps():
    model = net()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    pruner = ocsfast.attach(
        model, 0.5, optimizer=optimizer, example_inputs=batch(0)[0], check_every=2, sparsify_from=1
    )
    for k in range(12):
        x, y = batch(k)
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if k % 2:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ocsfast.step(model, 0.5)
    assert (pruner.steps, len(pruner.history)) == (6, 3)
    assert pruner.history[-1].nats > 0


def test_an_operator_without_a_rule_stays_dense_and_is_named_in_the_report():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            x = torch.native_layer_norm(self.first(x).relu(), (16,), None, None, 1e-5)[0]
            return self.head(self.second(x).relu())

    torch.manual_seed(0)
    model = Normed()
    optimizer = sgd(model)
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    for _ in range(20):
        for _ in range(EPOCH):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        report = ocsfast.step(model, 0.3, total_steps=20 * EPOCH)
    assert report.stage == "pruned"
    assert (model.first.out_features, model.second.in_features) == (16, 16)
    assert model.second.out_features == model.head.in_features < 16
    reasons = {frozen.where: frozen.reason for frozen in report.frozen}
    assert "no rule for aten.native_layer_norm" in reasons["first"]
    assert reasons["head"] == "model output"
