"""What only a GPU can show: launches, streams, graphs, waiting, and agreement with the CPU."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from helpers import builders
from helpers.builders import Case, case, chain, draw_mask, families, mixed_case, one_of_each, scalar
from helpers.networks import Net, batch, net
from helpers.tolerance import DTYPES
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import ocsfast
from ocsfast import optim
from ocsfast.choice.selection import choose
from ocsfast.ops import functions as ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_on_the_cpu(dtype: torch.dtype, channels_last: bool) -> None:
    ours, theirs = (
        one_of_each(mixed_case(dtype, channels_last=channels_last, device=device))
        for device in ("cuda", "cpu")
    )
    eps = torch.finfo(dtype).eps
    for name, call in ours.items():
        for a, b in zip(call(), theirs[name](), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=8 * max(eps, 1e-7), atol=8 * max(eps, 1e-7))


def test_one_launch_a_call() -> None:
    for name, call in one_of_each(mixed_case(device="cuda")).items():
        call()
        if name in ("sgd_step_", "adamw_step_"):
            continue  # these read the squares as well: see `test_launches_of_a_step`
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        kernels = [e.key for e in profile.key_averages() if "ocsfast::cuda" in e.key]
        counts = sum(e.count for e in profile.key_averages() if "ocsfast::cuda" in e.key)
        assert counts == 1, (name, kernels)


def test_the_callers_stream_is_used() -> None:
    made = mixed_case(device="cuda")
    bound, mask = made.bound(), draw_mask(made.plan, 1.0)
    stream = torch.cuda.Stream()
    expected = [w.clone() for w in made.weights]
    ops.shrink_(made.bound(expected), mask, scalar(0.5, "cuda"))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a launch on another stream would be done long before
        for weight in made.weights:
            weight.mul_(2.0)
        ops.shrink_(bound, mask, scalar(0.5, "cuda"))
    stream.synchronize()
    for weight, half in zip(made.weights, expected, strict=True):
        torch.testing.assert_close(weight, 2 * half)


def test_no_op_waits() -> None:
    made = mixed_case(device="cuda")
    calls = one_of_each(made)
    for call in calls.values():
        call()
    torch.cuda.set_sync_debug_mode("error")
    for call in calls.values():
        call()


@pytest.fixture(autouse=True)
def waits_are_allowed_again() -> Iterator[None]:
    """Also where a test fails in between."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def every_call(made: Case) -> dict[str, Callable[[], list[Tensor]]]:
    """All ops, those that take tables alone too."""
    plan, cost = chain([300, 70, 5], "cuda")
    scores, most = torch.linspace(1, 0, 375, device="cuda"), torch.tensor([299, 69, 4], device="cuda")
    budget = torch.tensor(cost([150, 35, 3]), device="cuda")
    a, b = draw_mask(made.plan, 0.5), draw_mask(made.plan, 0.7, 1)
    compare = builders.comparison(made.plan, a, b, b)
    return {
        **cast(dict[str, Callable[[], list[Tensor]]], one_of_each(made)),
        "partition": lambda: list(ops.partition(plan, cost, scores, most, budget, 1)),
        "compare": lambda: [compare()],
    }


def trained(
    kind: type[Optimizer] = optim.SGD, *, capturable: bool = False, **settings: Any
) -> tuple[Net, Optimizer, ocsfast.Pruner]:
    """A network on the GPU after a few steps, with a pruner that begins to shrink at its first check."""
    model = net().cuda()
    optimizer = kind(model.parameters(), **{"lr": 0.02, **settings})
    pruner = ocsfast.attach(
        model,
        0.5,
        optimizer=optimizer,
        example_inputs=batch(0)[0].cuda(),
        total_steps=60,
        sparsify_from=1,
        max_residual=None,
        capturable=capturable,
    )
    # On another stream, as what is to be captured has to be warmed up.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for k in range(3):
            step(model, optimizer, k)
    torch.cuda.current_stream().wait_stream(side)
    return model, optimizer, pruner


def step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    x, y = (t.cuda() for t in batch(seed))
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "name", ["group_saliency", "shrink_", "lasso_grad_", "sgd_step_", "adamw_step_"]
)
def test_an_op_replays_in_a_graph(name: str) -> None:
    """Ten replays are ten calls more, to rounding: a captured step takes its norms anew."""
    captured, called = (one_of_each(mixed_case(device="cuda"))[name] for _ in range(2))
    captured()  # so that an optimizer's step finds what it needs
    called()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = cast(list[Tensor], captured())
    for _ in range(10):
        graph.replay()
        expected = cast(list[Tensor], called())
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["partition", "compare"])
def test_a_choice_replays_in_a_graph(name: str) -> None:
    call = every_call(mixed_case(device="cuda"))[name]
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for _ in range(10):
        for result in results:
            result.zero_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_the_first_call_may_be_captured() -> None:
    """In a process of its own, where no kernel has been loaded."""
    program = """
import torch
from helpers.builders import draw_mask, mixed_case, scalar
from ocsfast.ops import functions as ops
made = mixed_case(device="cuda")
bound, mask, half = made.bound(), draw_mask(made.plan, 1.0), scalar(0.5, "cuda")
before = [w.clone() for w in made.weights]
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    ops.shrink_(bound, mask, half)
    scores, _ = ops.group_saliency(bound)
graph.replay()
assert not any(torch.equal(a, b) for a, b in zip(before, made.weights))
bound.forget()
assert torch.equal(scores, ops.group_saliency(bound)[0])
"""
    subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1], timeout=120
    )


def test_another_stream_than_binds_and_release_while_it_sleeps() -> None:
    """Scratch memory is handed out again at once: what runs elsewhere must have been waited for."""
    made = mixed_case(device="cuda")
    expected = ops.group_saliency(made.bound())[0]
    for _ in range(20):
        bound = made.bound()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(5_000_000)
            scores, _ = ops.group_saliency(bound)
        sizes = [made.plan.count("slices"), 4096, 65536, 10**6]
        del bound
        gc.collect()
        # Of all sizes, so that whatever was freed is given out and written to.
        taken = [torch.full((size,), float("nan"), device="cuda") for size in sizes * 8]
        stream.synchronize()
        assert torch.equal(scores, expected)
        del taken


def test_replay_after_release() -> None:
    made = mixed_case(device="cuda")
    bound = made.bound()
    expected = ops.group_saliency(bound)[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores, _ = ops.group_saliency(bound)
    del bound
    gc.collect()
    taken = [torch.full((2**k,), float("nan"), device="cuda") for k in range(6, 22) for _ in range(8)]
    graph.replay()
    assert torch.equal(scores, expected)
    assert all(bool(t.isnan().all()) for t in taken)


def test_binding_cannot_be_captured() -> None:
    made = mixed_case(device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="cannot be bound"), torch.cuda.graph(graph):
        made.bound()
    torch.cuda.synchronize()


def test_a_penalized_step_waits_for_nothing() -> None:
    for kind in (torch.optim.SGD, optim.SGD, optim.AdamW):
        model, optimizer, pruner = trained(kind)
        assert pruner.step().stage == "sparsify"
        step(model, optimizer, 3)
        x, y = (t.cuda() for t in batch(4))
        torch.cuda.set_sync_debug_mode("error")
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")


def test_a_choice_waits_once() -> None:
    *_, pruner = trained()
    assert pruner._hooks.coupled is not None
    choose_now = partial(choose, pruner._parts.aim, pruner._hooks.coupled.bound)
    lag = pruner.config.lag
    before = [choose_now().mask for _ in range(lag)]
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        choose_now(before=before, lag=lag)
    torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) == 1, [str(w.message) for w in waits]


def test_a_scaled_step_waits_for_nothing() -> None:
    """Half precision with a gradient scaler: the optimizer unscales and skips in its own pass."""
    for kind in (optim.SGD, optim.AdamW):
        model, optimizer, _ = trained(kind, fused=True)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        x, y = (t.cuda() for t in batch(4))
        for checked in (False, True):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.float16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            if checked:
                torch.cuda.set_sync_debug_mode("error")
            scaler.step(optimizer)
            torch.cuda.set_sync_debug_mode("default")
            scaler.update()


@pytest.mark.parametrize("kind", [torch.optim.SGD, optim.SGD, optim.AdamW])
def test_a_whole_step_in_a_graph(kind: type[Optimizer]) -> None:
    """From before sparsity learning to the cut by one graph, beside the same run without."""
    settings: dict[str, Any] = {} if kind is not optim.AdamW else {"capturable": True}
    lr = torch.tensor(0.02, dtype=torch.float64, device="cuda") if kind is not torch.optim.SGD else 0.02
    (made, two, second), (eager, one, first) = (
        trained(kind, capturable=True, **({"lr": lr} | settings)),
        trained(kind, **settings),
    )
    x, y = (t.cuda() for t in batch(0))
    two.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        F.cross_entropy(made(x), y).backward()
        two.step()
    stages = []
    for epoch in range(12):
        for k in range(5):
            seed = 3 + 5 * epoch + k
            step(eager, one, seed)
            for static, value in zip((x, y), batch(seed), strict=True):
                static.copy_(value)
            graph.replay()
        ours, theirs = second.step(), first.step()
        stages.append(ours.stage)
        assert (ours.stage, ours.check) == (theirs.stage, theirs.check)
        assert ours.nats == pytest.approx(theirs.nats, rel=1e-5)
        if ours.cut:
            break
        for a, b in zip(eager.parameters(), made.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    assert stages[-1] == "pruned"
    assert "sparsify" in stages


def test_a_graph_without_capturable_is_refused() -> None:
    model, optimizer, _ = trained()
    x, y = (t.cuda() for t in batch(0))
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ocsfast.StateError, match="capturable=True"), torch.cuda.graph(graph):
        optimizer.step()
    torch.cuda.synchronize()


def test_the_same_bits_beside_other_work() -> None:
    """A hundred times, while another stream multiplies matrices."""
    made = mixed_case(device="cuda")
    calls = every_call(made)
    first = {name: [t.clone() for t in call()] for name, call in every_call(made).items()}
    other = torch.cuda.Stream()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for k in range(100):
        with torch.cuda.stream(other):
            a @ a
        calls = every_call(made)
        name = list(calls)[k % len(calls)]
        assert all(torch.equal(x, y) for x, y in zip(first[name], calls[name](), strict=True)), name


def test_more_than_two_to_the_31_elements() -> None:
    rows, cols = 70_000, 32_768
    if torch.cuda.mem_get_info()[0] < 4 * 2 * rows * cols:
        pytest.skip("needs 20 GB of memory")
    weight = torch.empty(rows, cols, dtype=torch.bfloat16, device="cuda").normal_()
    made = case(families([rows], {"w": {0: list(range(rows))}}), {"w": weight})
    bound = made.bound()
    scores, _ = ops.group_saliency(bound)
    expected = torch.cat([part.float().square().mean(1).sqrt() for part in weight.split(1000)])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=0)
    last = weight[-1].clone()
    mask = torch.zeros(rows, dtype=torch.bool, device="cuda")
    mask[-1] = True
    ops.shrink_(bound, mask, scalar(0.5, "cuda"))
    assert torch.equal(weight[-1], last * 0.5)


def test_launches_of_a_step() -> None:
    """One for SGD, two for AdamW, which counts in one of its own; and no other kernel of ours."""
    for kind, most in ((optim.SGD, 1), (optim.AdamW, 2)):
        model, optimizer, pruner = trained(kind)
        assert pruner.step().stage == "sparsify"
        step(model, optimizer, 3)
        x, y = (t.cuda() for t in batch(4))
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        ours = sum(e.count for e in profile.key_averages() if "ocsfast::cuda" in e.key)
        assert ours == most, kind


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    with torch.cuda.device(0):
        expected = [
            t.cpu() for t in cast(list[Tensor], one_of_each(mixed_case(device="cuda:0"))["shrink_"]())
        ]
        for name, call in one_of_each(mixed_case(device="cuda:1")).items():
            call()
            if name == "shrink_":
                other = one_of_each(mixed_case(device="cuda:1"))[name]()
                for a, b in zip(expected, cast(list[Tensor], other), strict=True):
                    assert torch.equal(a, b.cpu())
        assert torch.cuda.current_device() == 0
        assert torch.zeros(1, device="cuda").device.index == 0
