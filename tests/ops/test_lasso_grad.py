"""Eq. 8 against autograd of the loss term itself, in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.builders import Case, case, draw, draw_mask, families, mixed_case
from helpers.tolerance import DTYPES, assert_as_good_as_torch, assert_same_bits
from torch import Tensor

from ocsfast.ops import functions as ops
from ocsfast.ops import reference

STRENGTH = torch.tensor(0.3)


def equation_8(made: Case, mask: Tensor) -> list[Tensor]:
    """The gradient of strength * sum of |w|_2 over the slices of pruned groups."""
    weights = [w.double().cpu().requires_grad_() for w in made.weights]
    loss = sum((w.sum() * 0 for w in weights), torch.zeros((), dtype=torch.float64))
    for group, t, axis, indices in made.slices():
        if mask[group]:
            # torch.norm's gradient is 0 where the norm is 0.
            loss = loss + float(STRENGTH) * weights[t].index_select(axis, indices).norm()
    return list(torch.autograd.grad(loss, weights))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_grow_by_equation_8(
    device: str, dtype: torch.dtype, channels_last: bool, share: float
) -> None:
    made = mixed_case(dtype, channels_last=channels_last, device=device)
    made.parameters["big.weight"][:, 3] = 0  # slices of norm 0
    made.parameters["scale.weight"][0] = 0
    mask = draw_mask(made.plan, share)
    grads = draw(made, 5)
    ours, torchs = [g.clone() for g in grads], [g.clone() for g in grads]
    ops.lasso_grad_(made.bound(), ours, mask, STRENGTH.to(device))
    reference.lasso_grad_(made.bound(), torchs, mask, STRENGTH.to(device))
    for a, b, g, e in zip(ours, torchs, grads, equation_8(made, mask.cpu()), strict=True):
        assert_as_good_as_torch(a.cpu(), b.cpu(), g.double().cpu() + e)


def test_missing_gradients_are_left_out(device: str) -> None:
    made = mixed_case(device=device)
    mask = draw_mask(made.plan, 0.5)
    whole = draw(made, 5)
    some: list[Tensor | None] = [g.clone() if t % 2 else None for t, g in enumerate(whole)]
    ops.lasso_grad_(made.bound(), whole, mask, STRENGTH.to(device))
    ops.lasso_grad_(made.bound(), some, mask, STRENGTH.to(device))
    assert all(g is None or torch.equal(g, w) for g, w in zip(some, whole, strict=True))
    ops.lasso_grad_(made.bound(), [None] * len(some), mask, STRENGTH.to(device))


def test_gradients_may_have_other_strides(device: str) -> None:
    made = mixed_case(device=device)
    mask = draw_mask(made.plan, 0.5)
    plain = draw(made, 5)
    other = [g.clone(memory_format=torch.channels_last) if g.dim() == 4 else g.clone() for g in plain]
    strides = [g.stride() for g in other]
    ops.lasso_grad_(made.bound(), plain, mask, STRENGTH.to(device))
    ops.lasso_grad_(made.bound(), other, mask, STRENGTH.to(device))
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    assert [g.stride() for g in other] == strides


def test_gradients_beside_pruned_slices_stay_as_they_are(device: str) -> None:
    weight = torch.tensor([[1.0, float("inf")], [3.0, 4.0]], device=device)
    made = case(families([2, 2], {"w": {0: [0, 1], 1: [2, 3]}}), {"w": weight})
    grad = torch.tensor([[-0.0, 1.0], [1.0, 1.0]], device=device)
    mask = torch.tensor([False, True, False, False], device=device)
    ops.lasso_grad_(made.bound(), [grad], mask, torch.tensor(1.0, device=device))
    torch.testing.assert_close(grad.cpu(), torch.tensor([[-0.0, 1.0], [1.6, 1.8]]))
    assert grad[0, 0].signbit()


def test_the_gradients_version_is_raised(device: str) -> None:
    made = mixed_case(device=device)
    grads = draw(made, 5)
    before = [g._version for g in grads]
    ops.lasso_grad_(made.bound(), grads, draw_mask(made.plan, 0.5), STRENGTH.to(device))
    assert all(g._version > version for g, version in zip(grads, before, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_run_gives_the_same_bits(device: str, channels_last: bool) -> None:
    made = mixed_case(channels_last=channels_last, device=device)
    mask, grads = draw_mask(made.plan, 0.4), draw(made, 5)

    def run() -> list[Tensor]:
        copies = [g.clone() for g in grads]
        ops.lasso_grad_(made.bound(), copies, mask, STRENGTH.to(device))
        return copies

    assert_same_bits(run)


def test_the_op_passes_opcheck(device: str) -> None:
    made = mixed_case(device=device)
    mask, bound = draw_mask(made.plan, 0.4), made.bound()
    arguments = (bound.ticket, draw(made, 5), mask, STRENGTH.to(device), False)
    torch.library.opcheck(torch.ops.ocsfast.lasso_grad_.default, arguments)


def test_wrong_gradients_change_nothing() -> None:
    made = mixed_case()
    mask = draw_mask(made.plan, 0.4)
    for spoil, message in (
        (lambda g: g.double(), r"grads\[3\] is a Double tensor .* its weight a Float tensor"),
        (lambda g: g[:, 1:].contiguous(), r"grads\[3\] is a Float tensor of shape \(10, 77\)"),
    ):
        grads = draw(made, 5)
        grads[3] = spoil(grads[3])
        before = [g.clone() for g in grads]
        with pytest.raises(RuntimeError, match=r"ocsfast\.lasso_grad_: " + message):
            ops.lasso_grad_(made.bound(), grads, mask, STRENGTH)
        assert all(torch.equal(a, b) for a, b in zip(before, grads, strict=True))
    with pytest.raises(ValueError, match="0 tensors for 12 weights"):
        ops.lasso_grad_(made.bound(), [], mask, STRENGTH)
    with pytest.raises(RuntimeError, match="lam is Long, expected Float"):
        ops.lasso_grad_(made.bound(), draw(made, 5), mask, torch.tensor(1))
