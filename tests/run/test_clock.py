"""Training steps that are captured in a graph, and what they would repeat if they could not be."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from helpers.networks import Net, batch, net, train
from helpers.replay import Graph, capturing
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import ocsfast
from ocsfast.core.config import Config
from ocsfast.ops.functions import group_saliency
from ocsfast.optim import strength as schedule
from ocsfast.run.clock import Clock
from ocsfast.run.state import Progress

Make = Callable[[nn.Module], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "torch SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9),
    "SGD": lambda m: ocsfast.optim.SGD(m.parameters(), lr=0.02, momentum=0.9),
    "AdamW": lambda m: ocsfast.optim.AdamW(m.parameters(), lr=0.002, capturable=True),
}


class Captured:
    """A training step on static inputs, captured once and replayed."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.x, self.y = batch(0, torch.float64)
        optimizer.zero_grad(set_to_none=True)
        kept = [*model.parameters(), *model.buffers()]
        kept += [
            t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)
        ]
        before = [t.detach().clone() for t in kept]
        with capturing(monkeypatch) as self.graph:
            F.cross_entropy(model(self.x), self.y).backward()
            optimizer.step()
        with torch.no_grad():
            for tensor, value in zip(kept, before, strict=True):
                tensor.copy_(value)  # a capture runs nothing

    def __call__(self, seed: int) -> None:
        x, y = batch(seed, torch.float64)
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()


@pytest.mark.parametrize("options", [{}, {"shape": "cubic", "penalty": "shrink"}, {"strength": "paper"}])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_captured_run_is_the_run(
    kind: str,
    options: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One graph serves from the first step to the cut, another one after it."""
    eager, made = net().double(), net().double()
    runs: list[tuple[Net, Optimizer, ocsfast.Pruner]] = []
    for model, capturable in ((eager, False), (made, True)):
        optimizer = OPTIMIZERS[kind](model)
        pruner = ocsfast.attach(
            model,
            0.5,
            optimizer=optimizer,
            example_inputs=batch(0, torch.float64)[0],
            total_steps=70,
            check_every="call",
            max_residual=None,
            capturable=capturable,
            **options,
        )
        train(model, optimizer, 2)
        runs.append((model, optimizer, pruner))
    (eager, one, first), (made, two, second) = runs
    second._hooks.settle()
    step = Captured(made, two, monkeypatch)
    second._hooks.update_clock()  # a capture runs nothing: what recording it has counted is forgotten
    stages = []
    for epoch in range(14):
        for k in range(5):
            seed = 2 + 5 * epoch + k
            train(eager, one, 1, first=seed)
            step(seed)
        ours, theirs = second.step(), first.step()
        stages.append(ours.stage)
        assert (ours.stage, ours.check, ours.kept, ours.cut) == (
            *(theirs.stage, theirs.check, theirs.kept, theirs.cut),
        )
        assert second.steps == first.steps
        assert (ours.nats, ours.lam) == pytest.approx((theirs.nats, theirs.lam), rel=1e-6)
        if ours.cut:
            assert "capture again" in caplog.text
            for model, optimizer in ((eager, one), (made, two)):
                train(model, optimizer, 1)
            step = Captured(made, two, monkeypatch)
        for a, b in zip(eager.state_dict().values(), made.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert set(stages) == {"observe", "sparsify", "pruned"}


def test_what_is_not_capturable_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch(0)
    model = net()
    optimizer = ocsfast.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    F.cross_entropy(model(x), y).backward()
    with capturing(monkeypatch), pytest.raises(RuntimeError, match="take a step before the capture"):
        optimizer.step()
    assert not any(optimizer.state.values())
    ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=x)
    train(model, optimizer, 1)
    before = copy.deepcopy(model.state_dict())
    with capturing(monkeypatch), pytest.raises(ocsfast.StateError, match="capturable=True before"):
        optimizer.step()
    adamw = ocsfast.optim.AdamW(model.parameters(), lr=0.02)
    with capturing(monkeypatch), pytest.raises(RuntimeError, match="capturable is False"):
        adamw.step()
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )


def test_state_that_has_to_be_moved_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy in a graph would be made anew at every replay, of what was before."""
    model = net().to(memory_format=torch.channels_last)
    optimizer = ocsfast.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    train(model, optimizer, 1)
    state = optimizer.state[model.conv1.weight]
    state["momentum_buffer"] = state["momentum_buffer"].contiguous()
    with capturing(monkeypatch), pytest.raises(RuntimeError, match="take a step before the capture"):
        optimizer.step()
    train(model, optimizer, 1)
    with capturing(monkeypatch):
        optimizer.step()


def test_a_run_that_is_over_is_refused_by_the_devices_count() -> None:
    model = net()
    optimizer = ocsfast.optim.SGD(model.parameters(), lr=0.02)
    pruner = ocsfast.attach(
        model, 0.5, optimizer=optimizer, example_inputs=batch(0)[0], total_steps=3, capturable=True
    )
    train(model, optimizer, 6)
    with pytest.raises(ocsfast.ConfigError, match="has taken 6 already"):
        pruner.cut()


def test_what_replays_change_is_not_taken_as_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays raise no version: after a capture, sums of squares are taken anew for good."""
    model = net()
    optimizer = ocsfast.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    pruner = ocsfast.attach(
        model, 0.5, optimizer=optimizer, example_inputs=batch(0)[0], total_steps=60, capturable=True
    )
    train(model, optimizer, 2)
    assert pruner._hooks.coupled is not None
    bound = pruner._hooks.coupled.bound
    assert bound.knows()
    with capturing(monkeypatch):
        assert not bound.knows()
        optimizer.step()
    group_saliency(bound)
    assert not bound.knows()


def test_the_page_of_cuda_graphs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its script with a recorder in the graph's place."""
    page = Path(__file__).parents[2] / "docs" / "training" / "cuda-graphs.md"
    script = page.read_text().split("```python\n")[1].split("```")[0]
    for here, there in {
        ".cuda()": "",
        'torch.tensor(0.1, device="cuda")': "0.1",  # a tensor on the CPU is read
        'device="cuda"': 'device="cpu"',
        "torch.cuda.": "cuda.",
        "cuda.CUDAGraph()": "None",
        "with cuda.graph(graph):": "with capturing(monkeypatch) as graph:",
        "30, 40": "14, 3",
        "torch.randn(128,": "torch.randn(4,",
        "(128,)": "(4,)",
    }.items():
        assert here in script
        script = script.replace(here, there)
    exec(script, {"cuda": MagicMock(), "capturing": capturing, "monkeypatch": monkeypatch})
    printed = capsys.readouterr().out
    assert printed.startswith("pruned: ")


@pytest.mark.parametrize("shape", ["linear", "cubic"])
def test_lambda_is_the_schedules(shape: str) -> None:
    config = Config(shape=shape, nats=2.5)
    now = Progress(stage="sparsify", steps=7, start=5, planned=10, t_sl=1, check=3, scale=0.7)
    clock, mask = Clock(config, 3, torch.device("cpu")), torch.tensor([True, False, True])
    ramp = schedule.Ramp(2.5, 10, shape)
    clock.load(now, mask)
    assert torch.equal(clock.mask, mask)
    assert float(clock.scale) == 0.7
    for step in range(2, 15):
        lam = clock.lam(0.1)
        assert float(lam) == pytest.approx(ramp.at(step) / 0.1)
        assert float(clock.lam(torch.tensor(0.2, dtype=torch.float64))) == pytest.approx(
            ramp.at(step) / 0.2
        )
        clock.count(lam, 0.1, None)
        clock.count(lam, 0.1, torch.ones(1))  # skipped
    assert float(clock.lam(0.0)) == float(clock.lam(torch.zeros(()))) == 0
    clock.settle(now)
    assert now.steps == 20
    assert float(now.nats) == pytest.approx(ramp.total(15) - ramp.total(2))
    clock.settle(now)
    assert now.steps == 20


def test_outside_of_its_stage_nothing_shrinks() -> None:
    mask = torch.ones(3, dtype=torch.bool)
    for strength in ("auto", "paper"):
        clock = Clock(Config(strength=strength), 3, torch.device("cpu"))
        now = Progress(steps=7)
        clock.load(now, mask)
        assert not clock.mask.any()
        assert float(clock.lam(0.1)) == 0
        clock.load(replace(now, stage="sparsify", start=7, planned=4, t_sl=2, check=2), mask)
        assert float(clock.lam(0.1)) > 0


def test_a_read_in_a_graph_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with capturing(monkeypatch), pytest.raises(RuntimeError, match="waits for the device"):
        float(torch.ones(()))
    graph = Graph()
    a = torch.ones(2)
    with graph:
        b = a * 2
    a.fill_(3)
    graph.replay()
    assert b.tolist() == [6, 6]


def test_what_replays_write_to_outlives_its_pruner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody tells when a graph is replayed last: it would write to memory that is somebody else's."""
    model = net()
    optimizer = ocsfast.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    pruner = ocsfast.attach(
        model, 0.5, optimizer=optimizer, example_inputs=batch(0)[0], total_steps=60, capturable=True
    )
    train(model, optimizer, 2)
    with capturing(monkeypatch) as graph:
        optimizer.step()
    clock = pruner._hooks._clock
    assert clock is not None
    gone = weakref.ref(clock)
    written = [weakref.ref(tensor) for tensor in clock.tensors()]
    graph.calls.clear()
    ocsfast.detach(model)
    del clock, pruner
    gc.collect()
    assert gone() is None
    assert all(tensor() is not None for tensor in written)
