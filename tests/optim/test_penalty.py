"""Eq. 8 and 9 in the steps of any optimizer, held against formulas written from the labels."""

import copy

import pytest
import torch
from helpers.networks import EPOCH, batch, epochs, net, sgd, train
from helpers.replay import Graph
from helpers.runs import attach, run
from torch.nn import functional as F

import ocsfast
from ocsfast import Config
from ocsfast.optim.strength import paper_lambda


def test_nothing_is_penalized_before_the_stage():
    plain = net()
    train(plain, sgd(plain), 8)
    model = net()
    optimizer = sgd(model)
    pruner = attach(model, optimizer)
    train(model, optimizer, 8)
    pruner.step()
    assert pruner.stage == "observe"
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def loss_term(model, families, mask):
    """Eq. 8 from the labels: the sum of the plain norms of all slices of the pruned groups."""
    total, named = 0.0, dict(model.named_parameters())
    for axis in families.axes:
        if axis.tensor in named and not axis.tensor.endswith("bias"):
            for g in torch.nonzero(mask).flatten().tolist():
                index = torch.nonzero(axis.groups == g).flatten()
                if len(index):
                    total = total + named[axis.tensor].index_select(axis.axis, index).norm()
    return total


def factors(model, families, mask, factor):
    """Eq. 9 from the labels: what each element is multiplied by."""
    named = dict(model.named_parameters())
    result = {n: torch.ones_like(p) for n, p in named.items()}
    for axis in families.axes:
        if axis.tensor in named and not axis.tensor.endswith("bias"):
            gone = torch.tensor([g >= 0 and bool(mask[g]) for g in axis.groups.tolist()])
            shape = [1] * named[axis.tensor].dim()
            shape[axis.axis] = -1
            result[axis.tensor] *= torch.where(gone, factor, 1.0).view(shape)
    return result


def test_a_step_is_the_papers_to_the_letter():
    lr = 0.3
    model = net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    pruner = ocsfast.attach(
        model,
        0.5,
        optimizer=optimizer,
        example_inputs=batch(0, torch.float64)[0],
        config=Config.paper(
            "cifar", growth="recursive", sparsify_from=2, lambda0=0.01, delta=0.02, deadline=None
        ),
    )
    for check in range(1, 5):
        train(model, optimizer, EPOCH, first=check * EPOCH)
        report = pruner.step()
    assert (pruner.t_sl, report.check) == (2, 4)
    lam = 0.01 + 0.02 * (1 + 2)  # Eq. 7: lambda_4 = lambda_2 + delta * 1 + delta * 2
    assert report.lam == pytest.approx(lam)
    assert paper_lambda(pruner.config, 2) == pytest.approx(lam)

    other = copy.deepcopy(model)
    x, y = batch(77, torch.float64)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    mask, families = pruner.mask, pruner.families
    (F.cross_entropy(other(x), y) + lam * loss_term(other, families, mask)).backward()
    expected = factors(other, families, mask, 1 - lam * lr)
    for name, p in other.named_parameters():
        wanted = (p.detach() - lr * p.grad) * expected[name]
        # strength and factor enter the kernels as float32
        torch.testing.assert_close(model.get_parameter(name).detach(), wanted, rtol=1e-6, atol=1e-9)


def test_each_parameter_group_shrinks_by_its_own_rate():
    model = net()
    heads = [*model.fc1.parameters(), *model.fc2.parameters()]
    body = [p for p in model.parameters() if all(p is not q for q in heads)]
    optimizer = torch.optim.SGD([{"params": body, "lr": 0.1}, {"params": heads, "lr": 0.02}], lr=0.1)
    pruner = attach(
        model, optimizer, strength="paper", penalty="shrink", lambda0=0.5, sparsify_from=1, delta=0.0
    )
    train(model, optimizer, 2)
    pruner.step()
    before = copy.deepcopy(model)
    optimizer.zero_grad(set_to_none=False)  # zero gradients: only Eq. 9 moves anything
    optimizer.step()
    body_ids = {id(p) for p in body}
    for name, p in model.named_parameters():
        rate = 0.1 if id(p) in body_ids else 0.02
        expected = factors(before, pruner.families, pruner.mask, 1 - 0.5 * rate)[name]
        torch.testing.assert_close(p.detach(), before.get_parameter(name).detach() * expected)


def test_shrinkage_never_turns_signs():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    pruner = attach(
        model, optimizer, strength="paper", penalty="shrink", lambda0=0.5, sparsify_from=1, delta=0.0
    )
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    optimizer.step()
    pruner.step()
    optimizer.step()
    gone = torch.tensor([bool(pruner.mask[g]) for g in range(8)])
    assert not model.conv1.weight[gone].any()
    assert model.conv1.weight[~gone].any()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_a_fused_optimizer_scales_and_skips(name):
    """A fused optimizer unscales and skips by itself: Eq. 8 must be scaled, Eq. 9 skipped."""

    def steps(fused):
        model = net()
        kind = getattr(torch.optim, name)
        optimizer = kind(model.parameters(), lr=0.01, fused=fused)
        pruner = attach(model, optimizer, sparsify_from=1, strength="paper", lambda0=0.3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for k in range(6):
            x, y = batch(k)
            if k == 4:
                x = x * float("inf")  # an overflow: this step is skipped
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model.eval()(x), y)).backward()
            before = copy.deepcopy(model.state_dict())
            scaler.step(optimizer)
            if k == 4:
                assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
            scaler.update()
            if k == 1:
                pruner.step()
        assert pruner.stage == "sparsify"
        return model.state_dict()

    plain, fused = steps(False), steps(True)
    for key, value in plain.items():
        torch.testing.assert_close(fused[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "names"),
    [
        (ocsfast.optim.SGD, {"momentum": 0.9}, ["ocsfast::sgd_step_"]),
        (ocsfast.optim.AdamW, {}, ["ocsfast::adamw_step_"]),
        (
            torch.optim.SGD,
            {"momentum": 0.9, "fused": True, "one_pass": False},
            ["ocsfast::lasso_grad_", "aten::_fused_sgd_", "ocsfast::shrink_"],
        ),
        (
            torch.optim.SGD,
            {"momentum": 0.9, "fused": True},
            ["ocsfast::sgd_step_", "aten::_fused_sgd_"],
        ),
    ],
)
@pytest.mark.parametrize("penalized", [False, True])
def test_a_step_by_numbers_of_python_asks_a_device_for_nothing_else(kind, settings, names, penalized):
    """Any other op would be a launch. Numbers become tensors on the CPU, whatever the device."""
    settings = dict(settings)
    model, one_pass = net(), settings.pop("one_pass", True)
    optimizer = kind(model.parameters(), lr=0.02, **settings)
    pruner = attach(model, optimizer, sparsify_from=1, one_pass=one_pass) if penalized else None
    train(model, optimizer, 2)
    assert pruner is None or pruner.step().stage == "sparsify"
    train(model, optimizer, 1)
    with Graph() as graph:
        optimizer.step()
    called = []
    for op, _, options, _ in graph.calls:
        if op is torch.ops.aten.scalar_tensor.default:
            assert options["device"] == torch.device("cpu")
        elif op.name() != "aten::detach" and not op.name().startswith("profiler::"):
            called.append(op.name())
    torchs = kind is torch.optim.SGD  # which prunes nothing before the stage
    assert called == [
        name for name in names if penalized or not (torchs and name.startswith("ocsfast::"))
    ]


def test_closures_get_the_penalty():
    def one(with_closure):
        model = net()
        optimizer = sgd(model)
        pruner = attach(model, optimizer, sparsify_from=1, strength="paper", lambda0=0.5)
        train(model, optimizer, 2)
        pruner.step()

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch(9)[0]), batch(9)[1])
            loss.backward()
            return loss

        if with_closure:
            assert optimizer.step(closure) is not None
        else:
            closure()
            optimizer.step()
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(one(True), one(False), strict=True))


def test_steps_at_rate_0_do_not_count():
    """torch.distributed.checkpoint takes them to fill in an optimizer's state."""
    model, optimizer, pruner = run()
    train(model, optimizer, 3)
    rate, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], 0.0
    optimizer.step()
    optimizer.param_groups[0]["lr"] = rate
    assert pruner.steps == 3
    train(model, optimizer, 1)
    assert pruner.steps == 4


def test_a_learning_rate_may_be_a_tensor():
    def once(tensor):
        model = net()
        lr = torch.tensor(0.05) if tensor else 0.05
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, capturable=False, foreach=False)
        pruner = attach(model, optimizer, total_steps=20 * EPOCH, sparsify_from=2)
        return epochs(model, optimizer, pruner, 5)[-1]

    assert once(True).nats == pytest.approx(once(False).nats)
