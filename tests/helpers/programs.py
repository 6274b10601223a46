"""A user's program from its first step to the file that is deployed: trained, cut, saved, exported."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ocsfast

STEPS = 24


def finished(
    make: Callable[[], nn.Module],
    batch: Callable[[int], tuple[Any, ...]],
    loss_of: Callable[[nn.Module, tuple[Any, ...]], Tensor],
    *,
    ratio: float = 0.5,
    optimizer: Callable[[nn.Module], Any] | None = None,
    steps: int = STEPS,
    **options: Any,
) -> nn.Module:
    """Train a network with `ocsfast.step` in its loop, and do everything that a user then does with it.

    Args:
        make: makes the network.
        batch: the inputs of a step; the first ones are what is exported with.
        loss_of: of the network and its inputs.
        ratio: the share of the MACs that has to go.
        optimizer: of the network; None: Adam.
        steps: how many.
        options: of `ocsfast.step`.

    Returns:
        The cut and trained network, in evaluation mode.
    """
    torch.manual_seed(0)
    model, losses = make(), []
    stepping = torch.optim.Adam(model.parameters(), lr=2e-3) if optimizer is None else optimizer(model)
    for step in range(steps):
        loss = loss_of(model, batch(step))
        stepping.zero_grad()
        loss.backward()
        stepping.step()
        report = ocsfast.step(model, ratio, total_steps=steps, check_every=1, **options)
        losses.append(float(loss.detach()))
    assert report.stage == "pruned", report
    assert report.cost <= (1 - ratio) * report.cost_dense
    assert all(torch.tensor(losses).isfinite())
    model.eval()
    inputs = batch(0)
    torch.manual_seed(1)
    expected = model(*inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.ocs"
        ocsfast.save(model, path)
        fresh = make()
        ocsfast.load(fresh, path)
    torch.manual_seed(1)
    torch.testing.assert_close(fresh.eval()(*inputs), expected)
    exported = torch.export.export(model, inputs).module()
    torch.manual_seed(1)
    torch.testing.assert_close(exported(*inputs), expected, rtol=1e-4, atol=1e-5)
    return model
