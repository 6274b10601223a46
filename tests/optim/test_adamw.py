"""`ocsfast.optim.AdamW` beside `torch.optim.AdamW`, alone and while a pruner shrinks.

In float64 where a network is trained: AdamW makes whole steps of gradients that are but rounding.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.networks import Net, batch, net, train
from helpers.runs import attach
from helpers.tolerance import assert_as_good_as_torch
from torch import nn
from torch.nn import functional as F

import ocsfast
from ocsfast import ConfigError, optim

KINDS = (torch.optim.AdamW, optim.AdamW)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.0, "betas": (0.5, 0.9)},
    {"weight_decay": 0.3, "eps": 1e-3},
    {"maximize": True, "lr": 1e-4},
    {"lr": torch.tensor(0.01, dtype=torch.float64)},
]


def both(model: nn.Module, **settings: Any) -> list[tuple[nn.Module, torch.optim.AdamW]]:
    models = [model.double(), copy.deepcopy(model)]
    return [
        (own, kind(own.parameters(), **{"lr": 0.01, **settings}))
        for own, kind in zip(models, KINDS, strict=True)
    ]


def assert_alike(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("settings", SETTINGS)
def test_it_steps_as_torch_does(settings: dict[str, Any]) -> None:
    (torchs, one), (ours, two) = both(net(), **settings)
    for _ in range(2):
        train(torchs, one, 6)
        train(ours, two, 6)
        for optimizer in (one, two):
            optimizer.param_groups[0]["lr"] *= 0.5
    assert_alike(torchs, ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_twenty_steps_are_as_good_as_torchs(dtype: torch.dtype) -> None:
    shapes, gen = ((3, 5), (70, 300), (), (7,), (16, 8, 3, 3), (0, 4)), torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=gen).to(dtype) for s in shapes]
    runs: list[list[nn.Parameter]] = []
    for kind, of in (
        (optim.AdamW, dtype),
        (torch.optim.AdamW, dtype),
        (torch.optim.AdamW, torch.float64),
    ):
        parameters = [nn.Parameter(w.to(of, copy=True)) for w in start]
        optimizer, gen = kind(parameters, lr=0.01, weight_decay=0.1), torch.Generator().manual_seed(1)
        for _ in range(20):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=gen).to(dtype).to(of)
            optimizer.step()
        runs.append(parameters)
    for ours, torchs, exact in zip(*runs, strict=True):
        atol = torch.finfo(dtype).eps
        assert_as_good_as_torch(ours.detach(), torchs.detach(), exact.detach(), atol=atol)


def test_parameter_groups_keep_their_own_settings() -> None:
    models, optimizers = [net().double(), net().double()], []
    for model, kind in zip(models, KINDS, strict=True):
        flat = [p for p in model.parameters() if p.dim() < 2]
        rest = [p for p in model.parameters() if p.dim() > 1]
        groups = [
            {"params": rest, "weight_decay": 0.1},
            {"params": flat, "lr": 0.02, "betas": (0.7, 0.9)},
        ]
        optimizers.append(kind(groups, lr=0.01))
        train(model, optimizers[-1], 5)
        model.extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizers[-1].add_param_group({"params": [model.extra]})
        model.extra.grad = torch.full_like(model.extra, 2.0)
        optimizers[-1].step()
    assert_alike(*models)


def test_state_dicts_load_into_one_another() -> None:
    (torchs, one), (ours, two) = both(net())
    train(torchs, one, 3)
    train(ours, two, 3)
    a, b = copy.deepcopy(one.state_dict()), copy.deepcopy(two.state_dict())
    assert b["param_groups"] == a["param_groups"]
    for k, state in a["state"].items():
        assert list(b["state"][k]) == list(state)
        for key, value in state.items():
            torch.testing.assert_close(b["state"][k][key], value, check_dtype=True)
    one.load_state_dict(b)
    two.load_state_dict(a)
    train(torchs, one, 3, first=3)
    train(ours, two, 3, first=3)
    assert_alike(torchs, ours)


def test_the_state_of_torchs_fused_one_goes_on() -> None:
    model = net().double()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    train(model, optimizer, 2)
    twin.load_state_dict(model.state_dict())
    mine = optim.AdamW(twin.parameters(), lr=0.5)
    mine.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2, first=2)
    train(twin, mine, 2, first=2)
    assert_alike(model, twin)


def test_counts_are_saved_where_torch_looks_for_them() -> None:
    """And whatever else a state dict holds is passed on."""
    model = net()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    assert all(own["step"].device.type == "cpu" for own in state["state"].values())
    state["state"][999] = {"step": 1}
    state["state"][0]["step"] = state["state"][0]["step"].reshape(1)
    optimizer.load_state_dict(state)
    train(model, optimizer, 1)
    assert float(optimizer.state[next(model.parameters())]["step"]) == 3


def test_a_copy_steps_its_own_parameters() -> None:
    model = net().double()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    twin, twins = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2, first=2)
    train(twin, twins, 2, first=2)
    assert_alike(model, twin)


def test_gradients_that_are_missing_or_strided_otherwise_and_other_dtypes() -> None:
    """A parameter that is left out now and then counts its own steps."""
    models = []
    for kind in KINDS:
        torch.manual_seed(0)
        model = nn.ModuleDict({"linear": nn.Linear(4, 4), "idle": nn.Linear(2, 2)}).double()
        odd = [torch.randn(4, 6, dtype=torch.float64).T, torch.randn(3, 2, dtype=torch.complex128)]
        model["odd"] = nn.ParameterList([*odd, torch.randn(8, 6, dtype=torch.float64)[:, ::2]])
        optimizer = kind(model.parameters(), lr=0.1)
        for k in range(5):
            optimizer.zero_grad()
            out = model["linear"](torch.ones(1, 4, dtype=torch.float64))
            (out.square().sum() + sum(p.abs().square().sum() for p in model["odd"])).backward()
            weight, bias = model["linear"].weight, model["linear"].bias
            weight.grad = weight.grad.T.contiguous().T
            if k % 2:
                bias.grad = None
            optimizer.step()
        assert [int(optimizer.state[p]["step"]) for p in (weight, bias)] == [5, 3]
        assert not optimizer.state.get(model["idle"].weight)
        models.append(model)
    assert_alike(*models)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_state_with_other_strides_than_its_weight_goes_on(kind: str) -> None:
    """A state dict of a contiguous model, loaded beside a channels_last one."""
    settings: dict[str, Any] = {"lr": 0.01, **({"momentum": 0.9} if kind == "SGD" else {})}
    plain = net().double()
    turned = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    assert turned.conv2.weight.stride() != plain.conv2.weight.stride()
    one, two = (getattr(optim, kind)(m.parameters(), **settings) for m in (plain, turned))
    train(plain, one, 3)
    turned.load_state_dict(plain.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    train(plain, one, 3, first=3)
    train(turned, two, 3, first=3)
    assert_alike(plain, turned)


def test_a_sparse_gradient_is_refused_before_anything_changes() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "table": nn.Embedding(10, 4, sparse=True)})
    optimizer = optim.AdamW(model.parameters())
    model["linear"](model["table"](torch.tensor([1, 3]))).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_amsgrad_is_refused_wherever_it_comes_from() -> None:
    model = net()
    message = r"amsgrad=True .* use torch\.optim\.AdamW"
    with pytest.raises(ConfigError, match=message):
        optim.AdamW(model.parameters(), amsgrad=True)
    with pytest.raises(ConfigError, match=message):
        optim.AdamW([{"params": model.parameters(), "amsgrad": True}])
    optimizer = optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    theirs = torch.optim.AdamW(model.parameters(), lr=0.5, amsgrad=True)
    with pytest.raises(ConfigError, match=message):
        optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    assert len(optimizer.state) == len(state["state"])
    with pytest.raises(ConfigError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "amsgrad": True})


def test_wrong_settings_are_torchs_errors() -> None:
    with pytest.raises(ValueError, match="beta parameter at index 1"):
        optim.AdamW(net().parameters(), betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="learning rate"):
        optim.AdamW(net().parameters(), lr=-1.0)


def test_a_gradient_that_does_not_fit_changes_nothing() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = optim.AdamW([weight])
    weight.grad = torch.ones(3, 3)
    weight.grad.data = torch.ones(3, 2)
    with pytest.raises(RuntimeError, match=r"ocsfast\.adamw_step_: grads\[0\]"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(3, 3))
    assert not optimizer.state[weight]


def test_grad_scaler_skips() -> None:
    model = net()
    optimizer = optim.AdamW(model.parameters())
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
    assert int(optimizer.state[model.fc1.weight]["step"]) == 1


@pytest.mark.parametrize(
    ("settings", "groups", "penalty"),
    [
        (SETTINGS[0], 1, "both"),
        (SETTINGS[2], 2, "lasso"),
        (SETTINGS[3], 2, "both"),
        (SETTINGS[-1], 1, "shrink"),
    ],
)
def test_a_pruned_run_is_that_of_torchs_adamw_with_hooks(
    settings: dict[str, Any], groups: int, penalty: str
) -> None:
    def run(kind: type[torch.optim.AdamW]) -> tuple[Net, list[Any], torch.optim.AdamW]:
        model = net().double()
        flat = [p for p in model.parameters() if p.dim() < 2]
        rest = [p for p in model.parameters() if p.dim() > 1]
        lr = float(settings.get("lr", 0.01)) / 2
        split = [{"params": rest}, {"params": flat, "weight_decay": 0.0, "lr": lr}]
        optimizer = kind(split if groups == 2 else model.parameters(), **{"lr": 0.01, **settings})
        x = batch(0, torch.float64)[0]
        pruner = ocsfast.attach(
            model,
            0.5,
            optimizer=optimizer,
            example_inputs=x,
            check_every="call",
            total_steps=60,
            penalty=penalty,
        )
        reports = []
        for epoch in range(14):
            train(model, optimizer, 5, first=5 * epoch)
            reports.append(pruner.step())
        return model, reports, optimizer

    (torchs, expected, one), (ours, got, two) = (run(kind) for kind in KINDS)
    assert [(r.stage, r.cost, r.kept) for r in got] == [(r.stage, r.cost, r.kept) for r in expected]
    assert [r.stage for r in got][-1] == "pruned"
    for a, b in zip(torchs.state_dict().values(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    for p, q in zip(torchs.parameters(), ours.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            a, b = one.state[p][key], two.state[q][key]
            assert b.shape == q.shape
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_one_launch_a_step() -> None:
    """One op a parameter group, with the penalty and without."""
    model = net()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
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
        assert {k: n for k, n in counts.items() if "bind" not in k} == {"ocsfast::adamw_step_": 3}
        pruner.step()
