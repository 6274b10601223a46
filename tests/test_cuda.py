"""What only a GPU can show: launches, streams, graphs, and agreement with the CPU."""

from __future__ import annotations

import pytest
import torch
from builders import draw_mask, mixed_case, one_of_each, scalar
from tolerance import DTYPES

from ocsfast import ops

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


def test_the_same_bits_a_hundred_times() -> None:
    made = mixed_case(device="cuda")
    first = {name: [t.clone() for t in call()] for name, call in one_of_each(made).items()}
    for _ in range(100):
        for name, call in one_of_each(made).items():
            assert all(torch.equal(a, b) for a, b in zip(first[name], call(), strict=True)), name


def test_one_launch_a_call() -> None:
    for name, call in one_of_each(mixed_case(device="cuda")).items():
        call()
        if name in ("sgd_step_", "adamw_step_"):
            continue  # its row above reads the squares as well
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
    try:
        for call in calls.values():
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ops_replay_in_a_graph() -> None:
    made = mixed_case(device="cuda")
    mask, factor = draw_mask(made.plan, 0.5), scalar(0.5, "cuda")
    bound, other = made.bound(), made.bound([w.clone() for w in made.weights])
    ops.shrink_(bound, mask, factor)  # warm: what is loaded at the first call is not captured
    ops.shrink_(other, mask, factor)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.shrink_(bound, mask, factor)
    for value in (0.9, 0.7):
        factor.fill_(value)
        graph.replay()
        ops.shrink_(other, mask, factor)
    for a, b in zip(bound.weights, other.weights, strict=True):
        assert torch.equal(a, b)
