"""`ocsfast.optim.SGD` beside `torch.optim.SGD`, alone and while a pruner shrinks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.networks import Net, batch, net, train
from helpers.runs import attach
from torch import nn
from torch.nn import functional as F

from ocsfast import optim

SETTINGS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.05},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.05},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "maximize": True, "lr": 1e-4},
    {"momentum": 0.9, "lr": torch.tensor(0.02)},
]


def both(model: nn.Module, **settings: Any) -> list[tuple[nn.Module, torch.optim.SGD]]:
    other = copy.deepcopy(model)
    settings = {"lr": 0.02, **settings}
    return [
        (model, torch.optim.SGD(model.parameters(), **settings)),
        (other, optim.SGD(other.parameters(), **settings)),
    ]


def assert_alike(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("settings", SETTINGS)
def test_it_steps_as_torch_does(settings: dict[str, Any]) -> None:
    (torchs, one), (ours, two) = both(net(), **settings)
    for _ in range(2):
        train(torchs, one, 4)
        train(ours, two, 4)
        for optimizer in (one, two):
            optimizer.param_groups[0]["lr"] *= 0.5
    assert_alike(torchs, ours)


def test_parameter_groups_keep_their_own_settings() -> None:
    models, optimizers = [net(), net()], []
    for model, kind in zip(models, (torch.optim.SGD, optim.SGD), strict=True):
        flat = [p for p in model.parameters() if p.dim() < 2]
        rest = [p for p in model.parameters() if p.dim() > 1]
        groups = [{"params": rest, "weight_decay": 0.1}, {"params": flat, "lr": 0.2, "momentum": 0}]
        optimizers.append(kind(groups, lr=0.02, momentum=0.9))
        train(model, optimizers[-1], 5)
        model.extra = nn.Parameter(torch.ones(3))
        optimizers[-1].add_param_group({"params": [model.extra]})
        model.extra.grad = torch.full((3,), 2.0)
        optimizers[-1].step()
    assert_alike(*models)


def test_state_dicts_load_into_one_another() -> None:
    (torchs, one), (ours, two) = both(net(), momentum=0.9)
    train(torchs, one, 3)
    train(ours, two, 3)
    assert two.state_dict()["param_groups"] == one.state_dict()["param_groups"]
    one_state, two_state = copy.deepcopy(one.state_dict()), copy.deepcopy(two.state_dict())
    one.load_state_dict(two_state)
    two.load_state_dict(one_state)
    train(torchs, one, 3, first=3)
    train(ours, two, 3, first=3)
    assert_alike(torchs, ours)


def test_a_copy_steps_its_own_parameters() -> None:
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 2)
    twin, twins = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2, first=2)
    train(twin, twins, 2, first=2)
    assert_alike(model, twin)


def test_gradients_that_are_missing_sparse_or_strided_otherwise() -> None:
    models = []
    for kind in (torch.optim.SGD, optim.SGD):
        torch.manual_seed(0)
        table = nn.Embedding(10, 4, sparse=True)
        model = nn.ModuleDict({"table": table, "linear": nn.Linear(4, 4), "idle": nn.Linear(2, 2)})
        model["odd"] = nn.ParameterList([torch.randn(4, 6).T, torch.randn(3, 2, dtype=torch.complex64)])
        optimizer = kind(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            out = model["linear"](model["table"](torch.tensor([1, 3, 3])))
            (out.square().sum() + sum(p.abs().square().sum() for p in model["odd"])).backward()
            assert model["table"].weight.grad.is_sparse
            weight = model["linear"].weight
            weight.grad = weight.grad.T.contiguous().T
            optimizer.step()
        models.append(model)
    assert_alike(*models)


def test_a_group_that_no_kernel_can_step() -> None:
    weights = [nn.Parameter(torch.ones(3, dtype=torch.complex64)) for _ in range(2)]
    optimizers = [torch.optim.SGD(weights[:1], lr=0.1), optim.SGD(weights[1:], lr=0.1)]
    for weight, optimizer in zip(weights, optimizers, strict=True):
        weight.grad = torch.full_like(weight, 1 + 2j)
        optimizer.step()
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], torch.ones(3, dtype=torch.complex64))


def test_a_closure_and_hooks() -> None:
    model, seen = net(), []
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        x, y = batch(0)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure).item() < first.item()
    assert seen == ["before", "after"] * 2


def test_weights_that_moved_are_bound_anew() -> None:
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 2)
    model.double()
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].double()
    x, y = batch(3, torch.float64)
    F.cross_entropy(model(x), y).backward()
    before = model.fc1.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.fc1.weight)


def test_a_step_raises_the_version_of_what_it_changes_alone() -> None:
    model = net()
    model.fc2.weight.requires_grad_(False)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    before = {name: p._version for name, p in model.named_parameters()}
    train(model, optimizer, 1)
    changed = {name for name, p in model.named_parameters() if p._version > before[name]}
    assert changed == set(before) - {"fc2.weight"}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("settings", "penalty"),
    list(zip(SETTINGS[2:], ["both", "lasso", "shrink"] * len(SETTINGS), strict=False)),
)
def test_a_pruned_run_is_that_of_torchs_sgd_with_hooks(
    settings: dict[str, Any], groups: int, penalty: str
) -> None:
    def run(kind: type[torch.optim.SGD]) -> tuple[Net, list[Any]]:
        model = net()
        flat = [p for p in model.parameters() if p.dim() < 2]
        rest = [p for p in model.parameters() if p.dim() > 1]
        lr = float(settings.get("lr", 0.02)) / 2
        split = [{"params": rest}, {"params": flat, "weight_decay": 0.01, "lr": lr}]
        optimizer = kind(split if groups == 2 else model.parameters(), **{"lr": 0.02, **settings})
        pruner = attach(
            model,
            optimizer,
            total_steps=60,
            penalty=penalty,
        )
        reports = []
        for epoch in range(14):
            train(model, optimizer, 5, first=5 * epoch)
            reports.append(pruner.step())
        return model, reports

    (torchs, expected), (ours, got) = run(torch.optim.SGD), run(optim.SGD)
    assert [(r.stage, r.cost, r.kept) for r in got] == [(r.stage, r.cost, r.kept) for r in expected]
    assert [r.stage for r in got][-1] == "pruned"
    for a, b in zip(torchs.state_dict().values(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


def test_one_launch_a_step() -> None:
    """One op a parameter group, with the penalty and without."""
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    pruner = attach(
        model,
        optimizer,
        total_steps=60,
        sparsify_from=1,
    )
    for stage in ("observe", "sparsify"):
        assert pruner.stage == stage
        with torch.profiler.profile() as profile:
            train(model, optimizer, 3)
        counts = {e.key: e.count for e in profile.key_averages() if e.key.startswith("ocsfast::")}
        assert {k: n for k, n in counts.items() if "bind" not in k} == {"ocsfast::sgd_step_": 3}
        pruner.step()


def scaled_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    seed: int,
    overflows: bool,
) -> None:
    """A training step with its loss scaled; where it overflows, one gradient is infinite."""
    optimizer.zero_grad()
    x, y = batch(seed)
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    if overflows:
        grad = next(p.grad for p in model.parameters() if p.grad is not None)
        grad.view(-1)[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()


def test_grad_scaler_skips() -> None:
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = model.fc1.weight.detach().clone()
    for k, factor in enumerate((1.0, float("inf"))):
        optimizer.zero_grad()
        x, y = batch(k)
        scaler.scale(F.cross_entropy(model.eval()(x * factor), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model.fc1.weight) == (k == 1)
        before = model.fc1.weight.detach().clone()


@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
def test_it_unscales_and_skips_in_its_pass(kind: type[torch.optim.Optimizer], dampening: float) -> None:
    """As with gradients that the scaler unscales first, overflow at the first step and later."""
    settings = (
        {"lr": 0.02} if kind is optim.AdamW else {"lr": 0.1, "momentum": 0.9, "dampening": dampening}
    )

    def run(by_itself: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net()
        optimizer = kind(model.parameters(), fused=by_itself, **settings)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        pruner = attach(
            model,
            optimizer,
            total_steps=20,
            sparsify_from=1,
            capturable=by_itself,  # or steps that are skipped would be counted
        )
        for k in range(12):
            before = model.fc2.weight.detach().clone()
            scaled_step(model.eval(), optimizer, scaler, k, k in (0, 5))
            assert torch.equal(before, model.fc2.weight) == (k in (0, 5))
            if k == 3:
                assert pruner.step().stage == "sparsify"
        return model, optimizer

    (ours, one), (torchs, two) = run(True), run(False)
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert one.state[a].get("step", 10) == two.state[b].get("step", 10) == 10


def test_steps_that_are_skipped_shrink_nothing() -> None:
    """The report's sum of lambda * lr is of the steps that were taken, where the host cannot know."""
    nats = []
    for fused in (False, True):
        model = net()
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
        pruner = attach(
            model,
            optimizer,
            total_steps=40,
            sparsify_from=1,
            strength="paper",
        )
        train(model, optimizer, 2)
        assert pruner.step().stage == "sparsify"
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for k in range(6):
            scaled_step(model, optimizer, scaler, k, k % 2 == 1)
        nats.append(pruner.step().nats)
    assert nats[0] == pytest.approx(nats[1]) != 0


def test_what_no_kernel_steps_is_unscaled_too() -> None:
    """A sparse gradient, on torch's path."""
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = optim.SGD(table.parameters(), lr=1.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = table.weight.detach().clone()
    scaler.scale(table(torch.tensor([1])).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(table.weight[1], before[1] - 1)
    scaler.scale(table(torch.tensor([2])).sum() * float("inf")).backward()
    scaler.step(optimizer)
    assert torch.equal(table.weight[2], before[2])


def test_wrong_settings_are_torchs_errors() -> None:
    with pytest.raises(ValueError, match="Nesterov"):
        optim.SGD(net().parameters(), nesterov=True)
    with pytest.raises(ValueError, match="learning rate"):
        optim.SGD(net().parameters(), lr=-1.0)


def test_a_gradient_that_does_not_fit_changes_nothing() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(3, 3)
    weight.grad.data = torch.ones(3, 2)
    with pytest.raises(RuntimeError, match=r"ocsfast\.sgd_step_: grads\[0\]"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(3, 3))
    assert not optimizer.state[weight]
