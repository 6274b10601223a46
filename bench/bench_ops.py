"""Each op on each model, beside its roof and its peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, case
from peers import Foreach, TorchPruning, compiled

from ocsfast.ops import functions as ops
from ocsfast.ops import reference

BYS = ("ocsfast", "eager", "torch.compile", "foreach", "Torch-Pruning")
# Eager and compiled formulations over 1.1 B parameters would take minutes, and memory that is not there.
TOO_LARGE = {"Llama 1.1B": ("eager", "torch.compile", "Torch-Pruning")}
# Compiling one op a hundred tensors takes minutes.
COMPILED = ("ResNet56",)
NEAR_ONE, TINY = 1.0 - 1e-7, 1e-12


@pytest.fixture
def made(name: str, device: str) -> Case:
    return case(name, device)


def skip_unless(by: str, name: str, device: str) -> None:
    name, _, dtype = name.partition(":")
    if dtype and by in ("eager", "torch.compile", "Torch-Pruning"):
        pytest.skip("float32 shows it")
    if by in TOO_LARGE.get(name, ()) or (by == "torch.compile" and name not in COMPILED):
        pytest.skip("takes too long")
    if by == "Torch-Pruning" and device != "cpu":
        pytest.skip("its model lies on the CPU")
    if by == "Torch-Pruning" and name == "ViT-B/16":
        pytest.skip("it would prune other groups: the residual width and, unpatched, no heads")


def scalar(value: float, made: Case) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=made.flat.device)


def run_all(
    by: str, made: Case, ours: Any, plain: Any, foreach: Any, theirs: Any
) -> Callable[[], object]:
    if by == "ocsfast":
        return ours
    if by == "eager":
        return plain
    if by == "torch.compile":  # what it can trace whole: the reference reads tables on the host
        return compiled(foreach(Foreach(made)))
    if by == "foreach":
        return foreach(Foreach(made))
    return theirs(TorchPruning(made))


@pytest.mark.parametrize("by", BYS)
def bench_group_saliency(by: str, name: str, made: Case, device: str, measure: Any) -> None:
    skip_unless(by, name, device)

    def ours() -> None:
        made.bound.forget()
        ops.group_saliency(made.bound)

    call = run_all(
        by,
        made,
        ours,
        lambda: reference.group_saliency(made.bound),
        lambda f: f.group_saliency,
        lambda t: t.group_saliency,
    )
    measure(
        "group_saliency",
        by,
        call,
        moved=made.size * made.flat.numel(),
        roof=lambda: torch.sum(made.flat),
        ours=ours,
        slow=by in ("eager", "Torch-Pruning") or (by == "foreach" and name.startswith("Llama")),
    )


@pytest.mark.parametrize("marked", ["all", "half"])
@pytest.mark.parametrize("by", BYS)
def bench_shrink(by: str, marked: str, name: str, made: Case, device: str, measure: Any) -> None:
    skip_unless(by, name, device)
    if by == "Torch-Pruning":
        pytest.skip("it has no Eq. 9")
    mask, factor = made.every if marked == "all" else made.half, scalar(NEAR_ONE, made)
    touched = made.touched(mask) // made.size  # elements

    def ours() -> None:
        ops.shrink_(made.bound, mask, factor)

    call = run_all(
        by,
        made,
        ours,
        lambda: reference.shrink_(made.bound, mask, factor),
        lambda f: lambda: f.shrink(mask, factor),
        None,
    )
    roof = made.flat[:touched]
    measure(
        f"shrink_, {marked}",
        by,
        call,
        moved=2 * made.size * touched,
        roof=lambda: roof.mul_(NEAR_ONE),
        ours=ours,
        slow=by == "eager",
    )


@pytest.mark.parametrize("marked", ["all", "half"])
@pytest.mark.parametrize("by", BYS)
def bench_lasso_grad(by: str, marked: str, name: str, made: Case, device: str, measure: Any) -> None:
    """With the norms at hand, as `shrink_` leaves them for the step after it."""
    skip_unless(by, name, device)
    mask, lam = made.every if marked == "all" else made.half, scalar(TINY, made)
    touched = made.touched(mask) // made.size
    ops.group_saliency(made.bound)

    def ours() -> None:
        ops.lasso_grad_(made.bound, made.grads, mask, lam)

    call = run_all(
        by,
        made,
        ours,
        lambda: reference.lasso_grad_(made.bound, made.grads, mask, lam),
        lambda f: lambda: f.lasso_grad(mask, lam),
        lambda t: t.regularize,
    )
    weight, grad = made.flat[:touched], made.flat_grad[:touched]
    measure(
        f"lasso_grad_, {marked}",
        by,
        call,
        moved=3 * made.size * touched,
        roof=lambda: grad.add_(weight, alpha=TINY),
        ours=ours,
        slow=by in ("eager", "Torch-Pruning") or (by == "foreach" and name.startswith("Llama")),
    )


def bench_lasso_grad_anew(name: str, made: Case, measure: Any) -> None:
    """With the norms taken first, as after a step of an optimizer that leaves none behind."""
    strength = scalar(TINY, made)

    def anew() -> None:
        made.bound.forget()
        ops.lasso_grad_(made.bound, made.grads, made.every, strength)

    def roof() -> None:
        torch.sum(made.flat)
        made.flat_grad.add_(made.flat, alpha=TINY)

    moved = 4 * made.size * made.flat.numel()
    measure("lasso_grad_, norms taken", "ocsfast", anew, moved=moved, roof=roof)
