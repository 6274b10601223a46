"""The state machine on a small network: stages, penalty, deadline, resuming, determinism."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from helpers.networks import EPOCH, OPTIMIZERS, batch, epochs, net, sgd, train
from torch import nn
from torch.nn import functional as F

import ocsfast
from ocsfast import Config, ConfigError, StateError
from ocsfast.core.criteria import CRITERIA
from ocsfast.grouping.engines import group
from ocsfast.grouping.macs import count_macs
from ocsfast.ops import functions as ops
from ocsfast.ops.cost import build_cost_model, target_products
from ocsfast.optim.strength import paper_lambda


def attach(model, optimizer, ratio=0.5, **options):
    return ocsfast.attach(model, ratio, optimizer=optimizer, example_inputs=batch(0)[0], **options)


def run(name="SGD", seed=0, **options):
    model = net(seed)
    optimizer = OPTIMIZERS[name](model)
    pruner = attach(model, optimizer, **{"total_steps": 20 * EPOCH, **options})
    return model, optimizer, pruner


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_whole_run(name):
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


def test_predicted_cost_is_the_counted_one():
    model, optimizer, pruner = run()
    train(model, optimizer, 3)
    report = pruner.cut()
    assert count_macs(lambda: model.eval()(batch(0)[0][:1])) == report.cost
    assert report.forced
    assert report.cut


def test_target_params():
    model, optimizer, pruner = run(target="params", ratio=0.6)
    dense = sum(p.numel() for p in model.parameters())
    train(model, optimizer, 3)
    report = pruner.cut()
    assert (report.cost_dense, report.cost) == (dense, sum(p.numel() for p in model.parameters()))
    assert report.cost <= 0.4 * dense


def test_target_bytes_counts_each_tensor_in_its_dtype():
    model = net()
    model.fc2.double()
    families = group(net(), (batch(0)[0],))
    products, unit = target_products("bytes", families, dict(model.named_parameters()))
    sizes = [f.size for f in families.families]
    assert unit == "bytes"
    assert build_cost_model(families, products, unit)(sizes) == sum(
        p.numel() * p.element_size() for p in model.parameters()
    )


def test_a_weighted_target_lies_between_its_parts():
    def shares(target):
        model, optimizer, pruner = run(target=target)
        before = [sum(p.numel() for p in model.parameters()), pruner.families]
        dense_macs = build_cost_model(before[1], before[1].macs, "MACs")
        train(model, optimizer, 3)
        report = pruner.cut()
        left = dense_macs([kept for _, kept, _ in report.kept])
        params = sum(p.numel() for p in model.parameters())
        return 1 - left / report_dense(dense_macs, before[1]), 1 - params / before[0], report

    def report_dense(model, families):
        return model([f.size for f in families.families])

    flops, params, report = shares({"flops": 3, "params": 1})
    assert 0.75 * flops + 0.25 * params == pytest.approx(1 - report.cost / report.cost_dense, abs=1e-6)
    assert report.cost <= report.cost_dense // 2
    assert shares({"flops": 1})[2].kept == shares("flops")[2].kept


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


def test_a_criterion_of_your_own():
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


def test_target_of_your_own():
    model, optimizer, pruner = run(target=lambda families: families.macs[:1])
    train(model, optimizer, 3)
    assert pruner.cut().cost_dense == 8 * 3 * 9 * 64


def test_same_seed_same_bits():
    def once():
        model, optimizer, pruner = run()
        reports = epochs(model, optimizer, pruner, 14)
        return model.state_dict(), pruner.scores, pruner.mask, [(r.residual, r.nats) for r in reports]

    first, second = once(), once()
    assert all(torch.equal(v, second[0][k]) for k, v in first[0].items())
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])
    assert first[3] == second[3]


@pytest.mark.parametrize(
    ("most", "level", "told"),
    [
        (1e-9, "WARNING", "with groups that are not fully shrunk: the groups that go have 0.0231 of"),
        (0.9, "INFO", "(below max_residual=0.9: it is harmless)"),
        (None, "INFO", "(any is allowed)"),
    ],
)
def test_the_deadline_cuts_and_says_so(most, level, told, caplog, monkeypatch):
    monkeypatch.setattr("ocsfast.choice.stability.is_stable", lambda *indices: False)
    model, optimizer, pruner = run(max_residual=most, deadline=7)
    with caplog.at_level(logging.INFO, "ocsfast"):
        reports = epochs(model, optimizer, pruner, 8)
    assert [r.cut for r in reports] == [False] * 6 + [True, False]
    assert reports[6].forced
    (said,) = [r for r in caplog.records if "the plan's deadline has come at check 7" in r.getMessage()]
    assert said.levelname == level
    assert told in said.getMessage()
    assert ("larger span= or nats=" in said.getMessage()) == (level == "WARNING")


def test_deadline_as_a_share_and_start_in_time(caplog):
    model, optimizer, pruner = run(tau=0.0, epsilon=0.0, max_residual=1e-9, lag=9)
    reports = epochs(model, optimizer, pruner, 13)
    assert pruner.t_sl == 8  # 0.6 - 0.2 of 20 epochs, as Eq. 5 cannot be judged by then
    assert pruner.t_cut == 12
    assert reports[11].forced
    assert reports[11].nats == pytest.approx(3.0)


def test_length_from_the_scheduler():
    model = net()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    pruner = attach(model, optimizer, lag=9, epsilon=0.0, max_residual=1e-9)
    for e in range(12):
        train(model, optimizer, EPOCH, first=e * EPOCH)
        scheduler.step()
        pruner.step()
    assert (pruner.t_sl, pruner.t_cut) == (8, 12)


UNKNOWN = "nothing tells how long this run is"


@pytest.fixture
def never_stable(monkeypatch):
    """Only the plan's own limits begin a stage or end it."""
    for name in ("has_settled", "is_stable"):
        monkeypatch.setattr(f"ocsfast.choice.stability.{name}", lambda *indices: False)


def unknown_length(caplog):
    return [r for r in caplog.records if UNKNOWN in r.getMessage()]


def test_a_run_of_unknown_length_says_what_it_plans(caplog, never_stable):
    """At the first check, and it comes as it was said."""
    model = net()
    optimizer = sgd(model)
    pruner = attach(model, optimizer)
    epochs(model, optimizer, pruner, 1)
    (said,) = unknown_length(caplog)
    assert said.levelname == "WARNING"
    told = "groups shrink from call 24 of step on, and the cut comes at call 72 of step, at the latest"
    assert told in said.getMessage()
    assert "Pass epochs= (step is called once in each) or total_steps=" in said.getMessage()
    epochs(model, optimizer, pruner, 71, first=1)
    assert unknown_length(caplog) == [said]
    assert (pruner.t_sl, pruner.t_cut) == (24, 72)


def test_a_run_of_unknown_length_by_step(caplog, never_stable):
    """The call that only listens is one of those that are counted."""
    model = net()
    optimizer = sgd(model)
    calls = []
    for k in range(72):
        train(model, optimizer, EPOCH, first=k * EPOCH)
        calls.append(ocsfast.step(model, 0.5).stage)
    (said,) = unknown_length(caplog)
    assert "from call 24 of step on, and the cut comes at call 72 of step" in said.getMessage()
    assert calls.index("sparsify") + 1 == 24
    assert calls.index("pruned") + 1 == 72


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"check_every": 5}, "groups shrink from check 24 on, and the cut comes at check 72"),
        ({"check_every": 5, "sparsify_from": 6}, "from check 6 on, and the cut comes at check 18"),
        ({"check_every": 5, "strength": "paper"}, "groups shrink once the choice has settled, and the"),
    ],
)
def test_calls_that_are_no_checks(options, told, caplog):
    model, optimizer, pruner = run(total_steps=None, tau=0.0, epsilon=0.0, **options)
    for k in range(10):
        train(model, optimizer, 1, first=k)
        pruner.step()
    (said,) = unknown_length(caplog)
    assert told in said.getMessage()


@pytest.mark.parametrize("moved", [True, False])
def test_a_scheduler_that_moves_after_the_call_is_waited_for(moved, caplog):
    model = net()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    pruner = attach(model, optimizer, tau=0.0, epsilon=0.0)
    for e in range(4):
        train(model, optimizer, EPOCH, first=e * EPOCH)
        pruner.step()
        assert len(unknown_length(caplog)) == (0 if moved or e == 0 else 1)
        if moved:
            scheduler.step()


@pytest.mark.parametrize(
    "options",
    [{}, {"total_steps": None, "epochs": 20}, {"total_steps": None, "deadline": 9}, {"deadline": None}],
)
def test_a_run_that_is_planned_has_nothing_to_warn_of(options, caplog):
    epochs(*run(**options), 5)
    assert unknown_length(caplog) == []


def test_no_penalty_before_and_after():
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


def test_one_step_of_the_paper_to_the_letter():
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
def test_fused_optimizer_scales_and_skips(name):
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


@pytest.mark.parametrize("stop", [3, 9, 14])
def test_resume_is_the_same_run(stop, tmp_path):
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


def test_unreachable_ratio_names_the_largest():
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


def test_cut_and_detach_by_hand():
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


def test_check_every():
    model, optimizer, pruner = run(check_every=4)
    checks = []
    for k in range(13):
        train(model, optimizer, 1, first=k)
        checks.append(pruner.step().check)
    assert checks == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]


def test_inner_loop_calls_check_once_per_five_hundred(monkeypatch):
    monkeypatch.setattr("ocsfast.run.timetable.INNER_LOOP_STEPS", 6)
    model, optimizer, pruner = run(total_steps=None)
    checks = []
    for k in range(13):
        train(model, optimizer, 1, first=k)
        checks.append(pruner.step().check)
    assert checks == [0] * 5 + [1] * 6 + [2] * 2


def test_inner_loop_calls_check_fifty_times_in_a_run_of_known_length():
    model, optimizer, pruner = run(total_steps=150)
    for k in range(12):
        train(model, optimizer, 1, first=k)
        assert pruner.step().check == (k + 1) // 3


def test_a_length_that_is_over_already():
    model, optimizer, pruner = run(total_steps=2)
    train(model, optimizer, 3)
    with pytest.raises(ConfigError, match="total_steps=2, but the optimizer has taken 3 already"):
        pruner.step()
    assert not pruner.history


def test_checks_in_inference_mode():
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
    assert report.stability == float(ops.jaccard(plan, masks[1], masks[3]))
    assert report.changed == int((masks[2] != masks[3]).sum())


def test_learning_rate_as_a_tensor():
    def once(tensor):
        model = net()
        lr = torch.tensor(0.05) if tensor else 0.05
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, capturable=False, foreach=False)
        pruner = attach(model, optimizer, total_steps=20 * EPOCH, sparsify_from=2)
        return epochs(model, optimizer, pruner, 5)[-1]

    assert once(True).nats == pytest.approx(once(False).nats)
