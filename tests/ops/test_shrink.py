"""Eq. 9 against plain loops in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.builders import Case, case, draw_mask, families, mixed_case
from helpers.tolerance import DTYPES, assert_same_bits
from torch import Tensor

from ocsfast.ops import functions as ops
from ocsfast.ops import reference

FACTOR = torch.tensor(0.9)


def equation_9(made: Case, mask: Tensor) -> list[Tensor]:
    """w * factor for every pruned slice that contains w: an element in two slices, twice."""
    scaled = [weight.double().cpu().clone() for weight in made.weights]
    for group, t, axis, indices in made.slices():
        if mask[group]:
            for i in indices.tolist():
                scaled[t].select(axis, i).mul_(float(FACTOR))
    return scaled


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_shrink_by_equation_9(
    device: str, dtype: torch.dtype, channels_last: bool, share: float
) -> None:
    made = mixed_case(dtype, channels_last=channels_last, device=device)
    mask, exact = draw_mask(made.plan, share), equation_9(made, draw_mask(made.plan, share).cpu())
    ours, torchs = [w.clone() for w in made.weights], [w.clone() for w in made.weights]
    ops.shrink_(made.bound(ours), mask, FACTOR.to(device))
    reference.shrink_(made.bound(torchs), mask, FACTOR.to(device))
    for a, b, e in zip(ours, torchs, exact, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.double().cpu(), e, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_only_pruned_slices_are_touched(device: str) -> None:
    """Down to the bits of NaN and -0.0 beside them."""
    weight = torch.tensor([[1.0, -0.0, float("nan")], [2.0, 3.0, float("inf")]], device=device)
    made = case(families([2, 3], {"w": {0: [0, 1], 1: [2, 3, 4]}}), {"w": weight.clone()})
    mask = torch.tensor([False, True, False, True, False], device=device)
    ops.shrink_(made.bound(), mask, torch.tensor(0.5, device=device))
    expected = torch.tensor([[1.0, -0.0, float("nan")], [1.0, 0.75, float("inf")]])
    result = made.weights[0].cpu()
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(result.signbit(), expected.signbit())


def test_version_is_raised_and_parameters_may_require_grad(device: str) -> None:
    made = mixed_case(device=device)
    weights = [torch.nn.Parameter(w) for w in made.weights]
    before = [w._version for w in weights]
    ops.shrink_(made.bound(weights), draw_mask(made.plan, 0.5), FACTOR.to(device))
    assert [w._version for w in weights] == [version + 1 for version in before]


def test_a_backward_pass_that_needs_the_old_weights_fails(device: str) -> None:
    made = case(
        families([2], {"w": {0: [0, 1]}}), {"w": torch.nn.Parameter(torch.ones(2, 2, device=device))}
    )
    loss = made.weights[0].square().sum()
    ops.shrink_(made.bound(), draw_mask(made.plan, 1.0), FACTOR.to(device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_every_run_gives_the_same_bits(device: str) -> None:
    made = mixed_case(device=device)
    mask = draw_mask(made.plan, 0.4)

    def run() -> list[Tensor]:
        weights = [w.clone() for w in made.weights]
        ops.shrink_(made.bound(weights), mask, FACTOR.to(device))
        return weights

    assert_same_bits(run)


def test_the_op_passes_opcheck(device: str) -> None:
    made = mixed_case(device=device)
    bound = made.bound()
    arguments = (bound.ticket, draw_mask(made.plan, 0.4), FACTOR.to(device))
    torch.library.opcheck(torch.ops.ocsfast.shrink_.default, arguments)


@pytest.mark.parametrize(
    ("mask", "factor", "message"),
    [
        (torch.zeros(3, dtype=torch.bool), FACTOR, r"mask has shape \(3\), expected \(54,\)"),
        (torch.zeros(54), FACTOR, "mask is Float, expected Bool"),
        (torch.zeros(54, dtype=torch.bool), FACTOR.double(), "factor is Double, expected Float"),
        (
            torch.zeros(54, dtype=torch.bool),
            FACTOR[None],
            "factor has shape .*, expected a 0-dim tensor",
        ),
    ],
)
def test_wrong_arguments_change_nothing(mask: Tensor, factor: Tensor, message: str) -> None:
    made = mixed_case()
    before = [w.clone() for w in made.weights]
    with pytest.raises(RuntimeError, match=r"ocsfast\.shrink_: " + message):
        ops.shrink_(made.bound(), mask, factor)
    assert all(torch.equal(a, b) for a, b in zip(before, made.weights, strict=True))
