"""What only a GPU can show of an optimizer's whole steps: launches, waiting, graphs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.networks import batch
from helpers.on_gpu import backward, launched, no_waits, step, trained
from torch.nn import functional as F
from torch.optim import Optimizer

import ocsfast
from ocsfast import optim

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_penalized_step_waits_for_nothing() -> None:
    for kind in (torch.optim.SGD, optim.SGD, optim.AdamW):
        model, optimizer, pruner = trained(kind)
        assert pruner.step().stage == "sparsify"
        step(model, optimizer, 3)
        x, y = (t.cuda() for t in batch(4))
        with no_waits():
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def test_a_scaled_step_waits_for_nothing() -> None:
    """Half precision with a gradient scaler: the optimizer unscales and skips in its own pass."""
    for kind in (torch.optim.SGD, optim.SGD, optim.AdamW):
        model, optimizer, pruner = trained(kind, fused=True)
        assert pruner.step().stage == "sparsify"
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        x, y = (t.cuda() for t in batch(4))
        for checked in (False, True):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.float16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            with no_waits() if checked else nullcontext():
                scaler.step(optimizer)
            scaler.update()


@pytest.mark.parametrize("kind", [torch.optim.SGD, optim.SGD, optim.AdamW])
def test_a_whole_step_in_a_graph(kind: type[Optimizer]) -> None:
    """From before sparsity learning to the cut by one graph, beside the same run without.

    In float64: where a gradient is nothing but rounding, AdamW takes whole steps along it.
    """
    lr = torch.tensor(0.02, dtype=torch.float64, device="cuda") if kind is not torch.optim.SGD else 0.02
    made, two, second = trained(kind, capturable=True, dtype=torch.float64, lr=lr)
    eager, one, first = trained(kind, dtype=torch.float64)
    x, y = (t.cuda() for t in batch(0, torch.float64))
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
            for static, value in zip((x, y), batch(seed, torch.float64), strict=True):
                static.copy_(value)
            graph.replay()
        ours, theirs = second.step(), first.step()
        stages.append(ours.stage)
        assert (ours.stage, ours.check) == (theirs.stage, theirs.check)
        assert ours.nats == pytest.approx(theirs.nats, rel=1e-5)
        if ours.cut:
            break
        for a, b in zip(eager.parameters(), made.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert stages[-1] == "pruned"
    assert "sparsify" in stages


def test_a_graph_without_capturable_is_refused() -> None:
    model, optimizer, _ = trained()
    backward(model, optimizer, 0)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ocsfast.StateError, match="capturable=True"), torch.cuda.graph(graph):
        optimizer.step()
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    ("kind", "settings", "ours"),
    [
        (optim.SGD, {"momentum": 0.9}, 1),
        (optim.AdamW, {}, 2),  # it counts steps in a launch of its own
        (torch.optim.SGD, {"momentum": 0.9, "fused": True}, 1),  # torch's own steps what is not coupled
    ],
)
def test_launches_of_a_step(kind: type[Optimizer], settings: dict[str, Any], ours: int) -> None:
    """Those of our kernels, and torch's own where the step is torch's; with the penalty no other."""
    model, optimizer, pruner = trained(kind, **settings)
    backward(model, optimizer, 3)
    without = launched(optimizer.step)
    assert pruner.step().stage == "sparsify"
    step(model, optimizer, 4)
    backward(model, optimizer, 5)
    names = launched(optimizer.step)
    assert sum("ocsfast::cuda" in name for name in names) == ours, names
    if kind is torch.optim.SGD:
        assert len(names) <= len(without) + ours, (names, without)
    else:
        assert len(names) == len(without) == ours, (names, without)
