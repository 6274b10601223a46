"""Runs of torch's own optimizers by gradients that are drawn, so that rounding does not grow."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import ocsfast
from helpers.networks import Net, batch, net

RATE = 0.02


@dataclass(frozen=True)
class Case:
    """A way to train: the optimizer with its settings, and how weights lie."""

    kind: type[Optimizer]
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    penalty: str = "both"
    channels_last: bool = False
    param_groups: int = 1
    tensor_lr: bool = False
    cuts: bool = True

    def exact(self) -> Case:
        """The same in float64, by torch's plainest code."""
        settings = {**self.settings, "foreach": False, "fused": False}
        return replace(self, settings=settings, dtype=torch.float64)


@functools.cache
def families() -> ocsfast.Families:
    return ocsfast.group(net(), batch(0)[0])


class Trial:
    """A network, its optimizer and its pruner."""

    def __init__(self, case: Case, one_pass: bool, steps: int) -> None:
        self.case = case
        memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
        self.model: Net = net().to(case.dtype).to(memory_format=memory_format)
        for norm in (self.model.bn1, self.model.bn2):  # slices of one element, which keep their sign
            torch.nn.init.constant_(norm.weight, 3.0)
        self.optimizer = self._optimizer()
        self.pruner = ocsfast.attach(
            self.model,
            0.5,
            optimizer=self.optimizer,
            families=families(),
            total_steps=steps,
            check_every="call",
            sparsify_from=1,
            deadline=None,
            max_residual=None,
            penalty=case.penalty,
            strength="paper",  # weak, as about 0 rounding decides where a slice goes
            lambda0=0.01,
            one_pass=one_pass,
        )

    def _optimizer(self) -> Optimizer:
        lr: Any = torch.tensor(RATE, dtype=torch.float64) if self.case.tensor_lr else RATE
        settings = {"lr": lr, **self.case.settings}
        if self.case.param_groups == 1:
            return self.case.kind(self.model.parameters(), **settings)
        flat = [p for p in self.model.parameters() if p.dim() < 2]
        rest = [p for p in self.model.parameters() if p.dim() > 1]
        return self.case.kind(
            [{"params": rest, "lr": 0.75 * lr}, {"params": flat, "weight_decay": 0.0}], **settings
        )

    def step(self, seed: int) -> None:
        """One step by drawn gradients, of which one is missing now and then."""
        generator = torch.Generator().manual_seed(seed)
        for k, p in enumerate(self.model.parameters()):
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            # What every dtype can hold.
            rounded = torch.empty_like(p).copy_(drawn.bfloat16() / 16)
            p.grad = None if seed > 0 and (seed + k) % 11 == 0 else rounded
        self.optimizer.step()

    def state(self) -> tuple[dict[str, Any], ...]:
        packed = (self.model.state_dict(), self.optimizer.state_dict(), self.pruner.state_dict())
        return copy.deepcopy(packed)

    def load(self, state: tuple[dict[str, Any], ...]) -> None:
        weights, optimizer, pruner = copy.deepcopy(state)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer)
        self.pruner.load_state_dict(pruner)

    def tensors(self) -> dict[str, Tensor]:
        """All weights, and all that the optimizer keeps of them."""
        found = {}
        for name, p in self.model.named_parameters():
            found[name] = p.detach()
            found.update({f"{name}: {key}": v for key, v in self.optimizer.state[p].items()})
        return {name: v for name, v in found.items() if isinstance(v, Tensor)}
