"""Runs on a GPU, what they launch there, and whether they wait for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

import ocsfast
from helpers.networks import Net, batch, net
from ocsfast import optim


def trained(
    kind: type[Optimizer] = optim.SGD,
    *,
    capturable: bool = False,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> tuple[Net, Optimizer, ocsfast.Pruner]:
    """A network on the GPU after a few steps, with a pruner that begins to shrink at its first check."""
    model = net().to("cuda", dtype)
    if kind is optim.AdamW:
        settings["capturable"] = capturable
    optimizer = kind(model.parameters(), **{"lr": 0.02, **settings})
    pruner = ocsfast.attach(
        model,
        0.5,
        optimizer=optimizer,
        example_inputs=batch(0, dtype)[0].cuda(),
        total_steps=60,
        sparsify_from=1,
        max_residual=None,
        check_every="call",  # what a step launches is to be the step's own
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
    backward(model, optimizer, seed)
    optimizer.step()


def backward(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    x, y = (t.cuda() for t in batch(seed, next(model.parameters()).dtype))
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()


def launched(call: Callable[[], object]) -> list[str]:
    """All that a call starts on the device, kernels of torch and copies too."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    return [name for name in names if not name.startswith("Optimizer.")]  # a span that torch marks


@contextmanager
def no_waits() -> Iterator[None]:
    """What waits for the device inside is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
