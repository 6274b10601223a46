"""What is not a kernel, on every device: grouping and its proof, compilation, checkpoints, processes."""

from __future__ import annotations

import copy
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.networks import Net, batch, net
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import ocsfast

EPOCH = 5


@pytest.fixture
def process(device: str) -> Iterator[None]:
    """One process, which speaks with itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run(
    call: nn.Module,
    inner: nn.Module,
    optimizer: Optimizer,
    device: str,
    families: ocsfast.Families | None,
) -> list[str]:
    """Train through the cut; the stages it went through."""
    pruner = ocsfast.attach(
        inner,
        0.5,
        optimizer=optimizer,
        example_inputs=batch(0)[0].to(device),
        families=families,
        total_steps=14 * EPOCH,
        max_residual=None,
    )
    stages = []
    for k in range(14 * EPOCH):
        x, y = (t.to(device) for t in batch(k))
        optimizer.zero_grad()
        F.cross_entropy(call(x), y).backward()
        optimizer.step()
        if k % EPOCH == EPOCH - 1:
            stages.append(pruner.step().stage)
    return stages


def cut_now(device: str) -> tuple[Net, torch.Tensor]:
    model, x = net().to(device), batch(0)[0].to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=x).cut()
    return model, x


def test_what_would_be_cut(device: str) -> None:
    model, x = net().to(device), batch(0)[0].to(device)
    there, here = ocsfast.inspect(model, x, 0.5), ocsfast.inspect(net(), batch(0)[0], 0.5)
    times = "grouping takes"  # the last line says how long it took
    assert str(there).split(times)[0] == str(here).split(times)[0] != str(there)
    assert next(model.parameters()).device.type == device


def test_as_graph(device: str) -> None:
    model, x = net().to(device).eval(), batch(0)[0].to(device)
    graph = ocsfast.as_graph(copy.deepcopy(model), x).eval()
    torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.02)
    report = ocsfast.attach(graph, 0.5, optimizer=optimizer, example_inputs=x).cut()
    assert report.cost <= report.cost_dense / 2
    assert graph(x).shape == (len(x), 5)


def test_a_checkpoint_from_one_device_to_the_other(device: str, tmp_path: Path) -> None:
    model, x = cut_now(device)
    ocsfast.save(model, tmp_path / "small.safetensors")
    for place in {"cpu", device}:
        other = net(1).to(place)
        ocsfast.load(other, tmp_path / "small.safetensors")
        torch.testing.assert_close(
            other.eval()(x.to(place)), model.eval()(x).to(place), rtol=1e-3, atol=1e-4
        )


def test_a_run_goes_on_on_another_device(device: str) -> None:
    """The pruner's and the optimizer's state, saved on one and loaded on the other."""
    states: dict[str, torch.Tensor] = {}
    for place in (device, "cpu"):
        model, x = net().to(place), batch(0)[0].to(place)
        optimizer = ocsfast.optim.AdamW(model.parameters(), lr=1e-3)
        pruner = ocsfast.attach(
            model, 0.5, optimizer=optimizer, example_inputs=x, total_steps=60, check_every=4
        )
        if states:
            model.load_state_dict(states["model"])
            optimizer.load_state_dict(states["optimizer"])
            pruner.load_state_dict(states["pruner"])
        for k in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(batch(k)[0].to(place)), batch(k)[1].to(place)).backward()
            optimizer.step()
        pruner.step()
        parts = {"model": model, "optimizer": optimizer, "pruner": pruner}
        states = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    assert (pruner.steps, len(pruner.history)) == (8, 2)
    assert {float(state["step"]) for state in optimizer.state.values()} == {8.0}


def test_a_state_dict_of_torchs_fused_adamw(device: str) -> None:
    """Its counts lie on the device; ours go on from them, and back."""
    model, other = net().to(device), net().to(device)
    fused = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    ours = ocsfast.optim.AdamW(other.parameters(), lr=1e-2)
    for k in range(6):
        if k == 3:
            other.load_state_dict(model.state_dict())
            ours.load_state_dict(copy.deepcopy(fused.state_dict()))
        for one, optimizer in ((model, fused), (other, ours)):
            optimizer.zero_grad()
            x, y = (t.to(device) for t in batch(k))
            F.cross_entropy(one.eval()(x), y).backward()
            optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        assert float(ours.state[b]["step"]) == 6
    fused.load_state_dict(copy.deepcopy(ours.state_dict()))
    fused.step()
    assert {float(state["step"]) for state in fused.state.values()} == {7.0}


def test_compiled_before_and_after_the_cut(device: str) -> None:
    """By inductor where there is a GPU; on the CPU its graphs are run without a compiler."""
    model, x = net().to(device), batch(0)[0].to(device)
    compiled = torch.compile(model, backend="inductor" if device == "cuda" else "aot_eager")
    optimizer = ocsfast.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    stages = run(compiled, model, optimizer, device, None)
    assert stages[-1] == "pruned"
    torch.testing.assert_close(compiled.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("process")
def test_distributed_data_parallel_of_one(device: str) -> None:
    model = net().to(device)
    optimizer = ocsfast.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    assert run(DistributedDataParallel(model), model, optimizer, device, None)[-1] == "pruned"


@pytest.mark.usefixtures("process")
def test_fully_sharded_over_one(device: str) -> None:
    model = net().to(device)
    families = ocsfast.group(model, batch(0)[0].to(device))
    fully_shard(model, mesh=init_device_mesh(device, (1,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    assert run(model, model, optimizer, device, families)[-1] == "pruned"
