"""A whole optimizer step, with sparsity learning and without, beside torch's own optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, case
from torch import nn
from torch.optim import Optimizer

from ocsfast.ops import functions as ops

TORCHS = {"torch default": {}, "torch foreach": {"foreach": True}, "torch fused": {"fused": True}}
BYS = ("ocsfast", "ocsfast, half", "ocsfast, all", *TORCHS, "torch fused + shrink_ + lasso_grad_, half")
LR, MOMENTUM = 1e-9, 0.9


def parameters_of(made: Case) -> list[nn.Parameter]:
    parameters = [nn.Parameter(w) for w in made.bound.weights]
    for parameter, grad in zip(parameters, made.grads, strict=True):
        parameter.grad = grad
    return parameters


def run(
    op: str,
    by: str,
    made: Case,
    measure: Any,
    passes: int,
    torchs: Callable[..., Optimizer],
    step: Callable[[ops.Penalty | None], None],
) -> None:
    """The roof is torch's fused step: the same bytes, nothing pruned."""
    if by == "torch default" and made.flat.is_cuda:
        pytest.skip("foreach is the default there")
    device = str(made.flat.device)
    strength, factor = (torch.tensor(v, dtype=torch.float32, device=device) for v in (1e-12, 1 - 1e-7))
    mask = made.every if by == "ocsfast, all" else made.half
    penalty = None if by == "ocsfast" else ops.Penalty(mask, strength, factor)
    fused = torchs(fused=True)

    def ours() -> None:
        step(penalty)

    def beside() -> None:
        ops.lasso_grad_(made.bound, made.grads, mask, strength)
        fused.step()
        ops.shrink_(made.bound, mask, factor)

    ops.group_saliency(made.bound)
    call = {"torch fused + shrink_ + lasso_grad_, half": beside}.get(by)
    if call is None:
        call = torchs(**TORCHS[by]).step if by in TORCHS else ours
    moved = passes * made.size * made.flat.numel()
    # A penalized step finds the norms that the one before it left; an unpenalized one in between would
    # make it read all weights once more.
    ours_in_turn = (lambda: step(None)) if by in TORCHS else None
    measure(op, by, call, moved=moved, roof=fused.step, ours=ours_in_turn)


@pytest.mark.parametrize("by", BYS)
def bench_sgd_step(by: str, name: str, device: str, measure: Any) -> None:
    """Reads three values a parameter and writes two: 20 bytes in float32."""
    made = case(name, device)
    parameters = parameters_of(made)
    lr = torch.tensor(LR, dtype=torch.float64, device=device)

    def torchs(**options: Any) -> Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, **options)
        for parameter, momentum in zip(parameters, made.momenta, strict=True):
            optimizer.state[parameter]["momentum_buffer"] = momentum
        return optimizer

    def step(penalty: ops.Penalty | None) -> None:
        ops.sgd_step_(made.bound, made.grads, made.momenta, lr, momentum=MOMENTUM, penalty=penalty)

    run("SGD step", by, made, measure, 5, torchs, step)


@pytest.mark.parametrize("by", BYS)
def bench_adamw_step(by: str, name: str, device: str, measure: Any) -> None:
    """Reads four values a parameter and writes three: 28 bytes in float32."""
    if name.startswith("Llama 1.1B") and device == "cpu":
        pytest.skip("four tensors of its size, and torch's temporary ones, take more than 24 GB")
    made = case(name, device)
    parameters = parameters_of(made)
    lr = torch.tensor(LR, dtype=torch.float64, device=device)
    steps = [torch.tensor(999.0, device=device) for _ in parameters]

    def torchs(**options: Any) -> Optimizer:
        optimizer = torch.optim.AdamW(parameters, lr=LR, **options)
        on = device if "fused" in options else "cpu"
        for parameter, average, square in zip(parameters, made.momenta, made.squares, strict=True):
            optimizer.state[parameter] = {
                "step": torch.tensor(999.0, device=on),
                "exp_avg": average,
                "exp_avg_sq": square,
            }
        return optimizer

    def step(penalty: ops.Penalty | None) -> None:
        ops.adamw_step_(made.bound, made.grads, made.momenta, made.squares, steps, lr, penalty=penalty)

    run("AdamW step", by, made, measure, 7, torchs, step)
