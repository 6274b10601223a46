"""A whole optimizer step, with sparsity learning and without, beside torch's own optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import case
from torch import nn

from ocsfast import ops

TORCHS = {"torch default": {}, "torch foreach": {"foreach": True}, "torch fused": {"fused": True}}
BYS = ("ocsfast", "ocsfast, half", "ocsfast, all", *TORCHS, "torch fused + shrink_ + lasso_grad_, half")
LR, MOMENTUM = 1e-9, 0.9


@pytest.mark.parametrize("by", BYS)
def bench_sgd_step(by: str, name: str, device: str, measure: Any) -> None:
    """20 bytes a parameter. The roof is torch's fused step: the same bytes, nothing pruned."""
    made = case(name, device)
    parameters = [nn.Parameter(w) for w in made.bound.weights]
    for parameter, grad in zip(parameters, made.grads, strict=True):
        parameter.grad = grad

    def torchs(**options: Any) -> torch.optim.SGD:
        optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, **options)
        for parameter, momentum in zip(parameters, made.momenta, strict=True):
            optimizer.state[parameter]["momentum_buffer"] = momentum
        return optimizer

    lr = torch.tensor(LR, dtype=torch.float64, device=device)
    strength, factor = (torch.tensor(v, dtype=torch.float32, device=device) for v in (1e-12, 1 - 1e-7))
    mask = made.every if by == "ocsfast, all" else made.half
    penalty = None if by == "ocsfast" else ops.Penalty(mask, strength, factor)
    fused = torchs(fused=True)

    def ours() -> None:
        ops.sgd_step_(made.bound, made.grads, made.momenta, lr, momentum=MOMENTUM, penalty=penalty)

    def beside() -> None:
        ops.lasso_grad_(made.bound, made.grads, mask, strength)
        fused.step()
        ops.shrink_(made.bound, mask, factor)

    ops.group_saliency(made.bound)
    call = {"torch fused + shrink_ + lasso_grad_, half": beside}.get(by)
    if call is None:
        call = torchs(**TORCHS[by]).step if by in TORCHS else ours
    measure("SGD step", by, call, moved=20 * made.flat.numel(), roof=fused.step)
