"""Torch's own optimizers in one pass with the penalty: what they keep, and what is left to torch."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.networks import batch, net, train
from helpers.runs import attach
from helpers.torchs_runs import Case, Trial
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import ocsfast

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
MOMENTUM = Case(SGD, {"momentum": 0.9})
PASSES = {"ocsfast::sgd_step_", "ocsfast::adamw_step_"}
AROUND = {"ocsfast::lasso_grad_", "ocsfast::shrink_"}


def shrinking(case: Case = MOMENTUM, one_pass: bool = True) -> Trial:
    """A run whose groups shrink."""
    trial = Trial(case, one_pass, 40)
    for k in range(3):
        trial.step(k)
    assert trial.pruner.step().stage == "sparsify"
    return trial


class Called(TorchDispatchMode):
    """The names of our ops that change weights, as they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names |= {func.name()} & (PASSES | AROUND)
        return func(*args, **(kwargs or {}))


@contextmanager
def ops() -> Iterator[set[str]]:
    """The names of those of our ops that are called inside."""
    with Called() as mode:
        yield mode.names


def assert_alike(a: Trial, b: Trial) -> None:
    for name, value in a.tensors().items():
        torch.testing.assert_close(value, b.tensors()[name], rtol=1e-5, atol=5e-6)


def test_plain_stages_are_torchs_to_the_bit() -> None:
    trial, model = Trial(MOMENTUM, True, 40), net()
    plain = SGD(model.parameters(), lr=0.02, momentum=0.9)
    model.load_state_dict(trial.model.state_dict())
    for k in range(5):
        trial.step(k)
        for p, q in zip(model.parameters(), trial.model.parameters(), strict=True):
            p.grad = q.grad
        plain.step()
    assert trial.pruner.stage == "observe"
    assert all(map(torch.equal, model.parameters(), trial.model.parameters()))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (MOMENTUM, PASSES),
        (Case(ADAMW, {"foreach": True}), PASSES),
        (Case(ADAM), PASSES),
        (Case(ADAM, {"weight_decay": 0.1, "decoupled_weight_decay": True}), PASSES),
        (Case(ADAM, {"weight_decay": 0.1}), AROUND),  # added to the gradient
        (Case(ADAMW, {"amsgrad": True}), AROUND),
        (Case(ADAMW, {"betas": (torch.tensor(0.9), torch.tensor(0.9)), "foreach": False}), AROUND),
        (Case(SGD, {"weight_decay": torch.tensor(0.1), "foreach": False}), AROUND),
        (Case(torch.optim.RMSprop), AROUND),
    ],
)
def test_what_the_kernel_lacks_is_left_to_torch(case: Case, expected: set[str]) -> None:
    trial = shrinking(case)
    with ops() as called:
        trial.step(3)
    assert called
    assert called <= expected
    with ops() as called:
        shrinking(case, one_pass=False).step(3)
    assert called == AROUND


def test_a_subclass_may_have_a_step_of_its_own() -> None:
    class Twice(SGD):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            super().step()
            return super().step(closure)

    model = net()
    optimizer = Twice(model.parameters(), lr=0.02)
    train(model, optimizer, 1)
    attach(model, optimizer, total_steps=40)
    assert "_init_group" not in vars(optimizer)


def test_state_that_torch_has_yet_to_begin_is_begun_by_torch() -> None:
    ours, torchs = (shrinking(one_pass=one_pass) for one_pass in (True, False))
    for trial in (ours, torchs):
        trial.optimizer.state.clear()
    with ops() as called:
        ours.step(3)
    torchs.step(3)
    assert called == AROUND
    assert_alike(ours, torchs)
    with ops() as called:
        ours.step(4)
    torchs.step(4)
    assert called == PASSES & called != set()
    assert_alike(ours, torchs)


def test_state_that_lies_otherwise_stays_as_it_is() -> None:
    ours, torchs = (shrinking(one_pass=one_pass) for one_pass in (True, False))
    for trial in (ours, torchs):
        state = trial.optimizer.state[trial.model.fc1.weight]
        state["momentum_buffer"] = state["momentum_buffer"].T.contiguous().T
        trial.step(3)
    kept = ours.optimizer.state[ours.model.fc1.weight]["momentum_buffer"]
    assert kept.stride() == (1, kept.shape[0])
    assert_alike(ours, torchs)


def test_what_is_not_coupled_steps_as_torch_steps_it() -> None:
    ours, torchs = (shrinking(one_pass=one_pass) for one_pass in (True, False))
    for trial in (ours, torchs):
        extra = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        table = nn.Embedding(4, 3, sparse=True, _weight=torch.ones(4, 3))
        trial.optimizer.add_param_group({"params": [extra, table.weight], "lr": 0.1, "momentum": 0.0})
        for k in range(3, 6):
            extra.grad = torch.full_like(extra, 1 + 2j)
            table.weight.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 3), (4, 3))
            trial.step(k)
        trial.model.extra, trial.model.table = extra, table.weight  # compared with the others
    for name, value in torchs.tensors().items():
        if name.split(":")[0].endswith("bias") or name in ("extra", "table"):
            assert torch.equal(ours.tensors()[name], value), name
    assert_alike(ours, torchs) if False else None


def test_gradients_are_those_of_the_loss_to_all_hooks() -> None:
    trial, seen = Trial(MOMENTUM, True, 40), []
    trial.optimizer.register_step_pre_hook(lambda o, *_: seen.append(grads(o)))
    trial.optimizer.register_step_post_hook(lambda o, *_: seen.append(grads(o)))
    for k in range(3):
        trial.step(k)
    trial.pruner.step()
    seen.clear()
    with ops() as called:
        trial.step(3)
    assert called == {"ocsfast::sgd_step_"}
    before, after = seen
    assert len(before) == len(after) > 0
    assert all(map(torch.equal, before, after))


def grads(optimizer: Optimizer) -> list[Tensor]:
    held = (p for group in optimizer.param_groups for p in group["params"])
    return [p.grad.clone() for p in held if p.grad is not None]


def test_a_closure_that_fails_leaves_nothing_behind() -> None:
    trial = shrinking()

    def fails() -> float:
        raise ValueError("no loss")

    with pytest.raises(ValueError, match="no loss"):
        trial.optimizer.step(fails)
    for group in trial.optimizer.param_groups:
        group["lr"] = 0.0  # a step that moves nothing, and has no penalty
    before = [p.detach().clone() for p in trial.model.parameters()]
    with ops() as called:
        trial.step(3)
    assert called == set()
    assert all(map(torch.equal, before, trial.model.parameters()))


@pytest.mark.parametrize("end", ["detach", "cut", "drop"])
def test_the_optimizer_is_left_as_it_was(end: str) -> None:
    trial = shrinking()
    before = set(vars(SGD(net().parameters(), lr=0.1)))
    trial.step(3)
    if end == "drop":
        del trial.pruner
        ocsfast.api.runs.runs.clear()
        gc.collect()
    else:
        getattr(trial.pruner, end)()
        assert set(vars(trial.optimizer)) == before
    with ops() as called:
        trial.step(4)
    assert called == set()


def test_copies_and_pickles_are_plain() -> None:
    trial = shrinking()
    for twin in (copy.deepcopy(trial.optimizer), pickle.loads(pickle.dumps(trial.optimizer))):
        assert "_init_group" not in vars(twin)
        assert twin.state_dict().keys() == trial.optimizer.state_dict().keys()
        for p in twin.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        with ops() as called:
            twin.step()
        assert called == set()


def test_a_scheduler_wraps_the_step_before_and_after() -> None:
    trial = Trial(MOMENTUM, True, 40)
    schedule = torch.optim.lr_scheduler.StepLR(trial.optimizer, 1, 0.9)
    for k in range(3):
        trial.step(k)
        schedule.step()
    trial.pruner.step()
    later = torch.optim.lr_scheduler.StepLR(trial.optimizer, 1, 0.9)
    with ops() as called:
        trial.step(3)
    later.step()
    assert called == {"ocsfast::sgd_step_"}
    trial.pruner.cut()
    trial.step(4)
    assert hasattr(trial.optimizer.step, "_wrapped_by_lr_sched")


@pytest.mark.parametrize(("first", "check"), [(0, 4), (3, 2)])
def test_no_compiled_step_misses_its_penalty(first: int, check: int) -> None:
    """Whether torch runs what it compiled, or plain code beside it, once it has compiled too often."""
    torch.compiler.reset()
    trial, eager = Trial(MOMENTUM, True, 40), Trial(MOMENTUM, False, 40)
    compiled = torch.compile(trial.optimizer.step, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for k in range(14):
            with pytest.MonkeyPatch.context() as patch:
                if k >= first:
                    patch.setattr(trial.optimizer, "step", compiled)
                trial.step(k)
            eager.step(k)
            if k == check:
                assert trial.pruner.step().stage == eager.pruner.step().stage == "sparsify"
    assert_alike(trial, eager)


def test_a_resumed_run_goes_on_with_the_same_bits() -> None:
    whole = shrinking()
    state = whole.state()
    resumed = Trial(MOMENTUM, True, 40)
    resumed.load(state)
    for k in range(3, 6):
        whole.step(k)
        resumed.step(k)
    assert all(map(torch.equal, whole.tensors().values(), resumed.tensors().values()))


def test_two_pruners_of_one_optimizer() -> None:
    models = [net(0), net(1)]
    optimizer = SGD([p for model in models for p in model.parameters()], lr=0.02, momentum=0.9)
    x = batch(0)[0]
    pruners = [
        ocsfast.attach(m, 0.5, optimizer=optimizer, example_inputs=x, total_steps=60, sparsify_from=1)
        for m in models
    ]
    for _ in range(2):
        for model in models:
            model(x).square().sum().backward()
        optimizer.step()
    assert [pruner.step().stage for pruner in pruners] == ["sparsify"] * 2
    with ops() as called:
        optimizer.step()
    assert called == {"ocsfast::sgd_step_", *AROUND}  # the first one's, and the second one's
    for pruner in pruners:
        pruner.cut()
    assert "_init_group" not in vars(optimizer)
    train(models[0], optimizer, 1)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_unscales_first_or_leaves_it_to_the_step(fused: bool) -> None:
    runs = []
    for one_pass in (True, False):
        trial = shrinking(Case(SGD, {"momentum": 0.9, "fused": fused}), one_pass)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for k in range(6):
            for j, p in enumerate(trial.model.parameters()):
                generator = torch.Generator().manual_seed(100 * k + j)
                p.grad = 4.0 * torch.randn(p.shape, generator=generator)
                if k == 3:
                    p.grad.view(-1)[0] = float("inf")
            scaler.scale(torch.zeros(()))
            if k % 2:
                scaler.unscale_(trial.optimizer)
            with ops() as called:
                scaler.step(trial.optimizer)
            scaler.update(4.0)
            expected = PASSES if one_pass and (k % 2 or not fused) else AROUND
            assert called <= expected
            assert bool(called) != (k == 3 and not fused)
        runs.append(trial)
    assert_alike(*runs)
    for p, q in zip(*(trial.model.parameters() for trial in runs), strict=True):
        assert torch.equal(p.grad.isfinite(), q.grad.isfinite())
