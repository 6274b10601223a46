"""A training run that is killed at a moment of its own choosing, and goes on from its last checkpoint.

Everything that takes time passes through `Clock.moment`, which counts; at the wanted number the process
kills itself with SIGKILL, in the midst of what it does.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

import ocsfast
from helpers.networks import batch, net, sgd, train
from ocsfast.api import files
from ocsfast.cut import layout as slicing

EPOCHS, STEPS = 12, 4


class Clock:
    """Counts moments; dies at one of them."""

    def __init__(self, until: int | None) -> None:
        self.now = 0
        self.until = until

    def moment(self) -> None:
        self.now += 1
        if self.now == self.until:
            os.kill(os.getpid(), signal.SIGKILL)


def watch(clock: Clock, owner: object, name: str) -> None:
    """A moment before and after every call of a function."""
    inner = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        clock.moment()
        result = inner(*args, **kwargs)
        clock.moment()
        return result

    setattr(owner, name, watched)


def run(folder: Path, until: int | None = None) -> int:
    """Train to the end from the last checkpoint, if there is one; how many moments that took."""
    clock = Clock(until)
    watched = [
        (ocsfast.Pruner, "_evaluate"),
        (slicing.Layout, "place"),
        (os, "replace"),
        (torch, "save"),
    ]
    before = [getattr(*place) for place in watched]
    for place in watched:
        watch(clock, *place)
    try:
        _train(folder, clock)
    finally:
        for place, inner in zip(watched, before, strict=True):
            setattr(*place, inner)
    return clock.now


def _train(folder: Path, clock: Clock) -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=batch(0)[0])
    parts: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "pruner": pruner,
    }
    first = 0
    path = folder / "checkpoint.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        first = state.pop("epoch")
        torch.set_rng_state(state.pop("random"))
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for epoch in range(first, EPOCHS):
        for k in range(STEPS):
            train(model, optimizer, 1, first=epoch * STEPS + k)
            with torch.no_grad():  # something drawn at random
                model.fc2.bias.add_(1e-3 * torch.randn(5))
            clock.moment()
        scheduler.step()
        pruner.step()
        state = {name: part.state_dict() for name, part in parts.items()}
        with files.replacing(path) as part_of_it:
            torch.save({**state, "epoch": epoch + 1, "random": torch.get_rng_state()}, part_of_it)
    with files.replacing(folder / "end.pt") as part_of_it:
        torch.save({name: part.state_dict() for name, part in parts.items()}, part_of_it)
