"""What only a GPU can show: launches, streams, graphs, waiting, and agreement with the CPU."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.builders import case, draw_mask, every_call, families, mixed_case, one_of_each, scalar
from helpers.on_gpu import launched, trained
from helpers.tolerance import DTYPES

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
        kernels = launched(call)
        # `lasso_grad_` is called here with the norms forgotten: they are taken first.
        count = 2 if name == "lasso_grad_" else 1
        assert ["ocsfast::cuda" in kernel for kernel in kernels] == [True] * count, (name, kernels)


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


@pytest.mark.parametrize("numbers", ["cuda", "cpu"])
def test_no_op_waits(numbers: str) -> None:
    calls = one_of_each(mixed_case(device="cuda"), numbers)
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
        results = captured()
    for _ in range(10):
        graph.replay()
        expected = called()
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


def test_the_same_bits_beside_other_work() -> None:
    """A hundred times, while another stream multiplies matrices."""
    made = mixed_case(device="cuda")
    # Each on weights of its own: one that ran before would have changed them.
    first = {name: [t.clone() for t in every_call(made)[name]()] for name in every_call(made)}
    other = torch.cuda.Stream()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    other.wait_stream(torch.cuda.current_stream())
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    with torch.cuda.device(0):
        expected = [t.cpu() for t in one_of_each(mixed_case(device="cuda:0"))["shrink_"]()]
        for name, call in one_of_each(mixed_case(device="cuda:1")).items():
            call()
            if name == "shrink_":
                other = one_of_each(mixed_case(device="cuda:1"))[name]()
                for a, b in zip(expected, other, strict=True):
                    assert torch.equal(a, b.cpu())
        assert torch.cuda.current_device() == 0
        assert torch.zeros(1, device="cuda").device.index == 0
