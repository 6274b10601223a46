"""A step of AdamW with Eq. 8 before and Eq. 9 after it, against plain torch and against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.builders import Case, as_double, draw, draw_mask, mixed_case, penalty_of, with_uncoupled
from helpers.tolerance import DTYPES, assert_as_good_as_torch, assert_same_bits
from torch import Tensor

from ocsfast.ops import functions as ops
from ocsfast.ops import reference

SETTINGS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.0, "betas": (0.5, 0.9)},
    {"weight_decay": 0.3, "eps": 1e-3, "maximize": True},
    {"betas": (0.0, 0.0)},
]


def draw_squares(made: Case, seed: int) -> list[Tensor]:
    return [t.square_().add_(0.1) for t in draw(made, seed)]


def counts(made: Case, value: float = 0) -> list[Tensor]:
    return [torch.tensor(float(value), device=w.device) for w in made.weights]


def learning_rate(device: str, value: float = 0.1) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


@pytest.mark.parametrize("share", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_is_as_good_as_torchs(
    device: str,
    settings: dict[str, Any],
    dtype: torch.dtype,
    channels_last: bool,
    share: float | None,
) -> None:
    made = with_uncoupled(mixed_case(dtype, channels_last=channels_last, device=device))
    grads: list[Tensor | None] = list(draw(made, 1))
    averages: list[Tensor | None] = list(draw(made, 2))
    squares: list[Tensor | None] = list(draw_squares(made, 3))
    grads[2] = averages[2] = squares[2] = None
    steps: list[Tensor | None] = [torch.tensor(7.0 * k, device=device) for k in range(len(grads))]
    steps[2] = None
    penalty, lr = penalty_of(made, share), learning_rate(device)

    def run(step: Any, case: Case) -> list[Tensor]:
        like = case.weights[0]
        bound = case.bound([w.clone() for w in case.weights])
        own, first, second = (
            [None if t is None else t.to(like.dtype, copy=True) for t in tensors]
            for tensors in (grads, averages, squares)
        )
        taken = [None if t is None else t.clone() for t in steps]
        step(bound, own, first, second, taken, lr, penalty=penalty, **settings)
        assert taken[1] is not None
        assert float(taken[1]) == 8
        return [*bound.weights, *(t for t in (*first, *second) if t is not None)]

    results = [run(ops.adamw_step_, made), run(reference.adamw_step_, made)]
    exact = run(reference.adamw_step_, as_double(made))
    for ours, torchs, right in zip(*results, exact, strict=True):
        # The addends are about 1, and may cancel.
        assert_as_good_as_torch(ours.cpu(), torchs.cpu(), right.cpu(), atol=4 * torch.finfo(dtype).eps)


def test_the_reference_is_torchs_adamw() -> None:
    """What the kernels are held against steps as torch does where nothing is pruned."""
    made = mixed_case(torch.float64)
    theirs = [w.clone().requires_grad_() for w in made.weights]
    optimizer = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.2, foreach=False)
    bound, averages, squares = made.bound(), *([torch.zeros_like(w) for w in theirs] for _ in range(2))
    taken = counts(made)
    for seed in range(4):
        for weight, grad in zip(theirs, draw(made, seed), strict=True):
            weight.grad = grad
        optimizer.step()
        reference.adamw_step_(
            bound, draw(made, seed), averages, squares, taken, learning_rate("cpu"), weight_decay=0.2
        )
    for a, b in zip(bound.weights, theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12)


def test_it_leaves_the_squares_of_the_new_weights(device: str) -> None:
    made = with_uncoupled(mixed_case(device=device))
    bound, grads = made.bound(), draw(made, 1)
    states = draw(made, 2), draw_squares(made, 3)
    some: list[Tensor | None] = [None, *grads[1:]]
    steps, lr = counts(made, 2), learning_rate(device)
    ops.adamw_step_(bound, some, *states, steps, lr, penalty=penalty_of(made, 0.4))
    assert bound.knows()
    left = ops.group_saliency(bound)
    bound.forget()
    for ours, anew in zip(left, ops.group_saliency(bound), strict=True):
        torch.testing.assert_close(ours, anew, rtol=1e-6, atol=0)
    ops.adamw_step_(bound, some, *states, steps, lr)
    assert not bound.knows()


def test_nothing_divided_by_nothing_stays_out_of_the_sums(device: str) -> None:
    """Without eps the lanes beyond a band's end hold 0 / 0."""
    made = mixed_case(device=device)
    bound, grads = made.bound(), draw(made, 1)
    averages, squares = ([torch.zeros_like(g) for g in grads] for _ in range(2))
    steps, penalty = counts(made), penalty_of(made, 0.4)
    ops.adamw_step_(
        bound, grads, averages, squares, steps, learning_rate(device), eps=0.0, penalty=penalty
    )
    left = ops.group_saliency(bound)[0]
    bound.forget()
    torch.testing.assert_close(left, ops.group_saliency(bound)[0], rtol=1e-6, atol=0)
    assert bool(left.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_square_too_small_for_half_precision_does_no_harm(device: str, dtype: torch.dtype) -> None:
    made = mixed_case(dtype, device=device)
    bound = made.bound([torch.zeros_like(w) for w in made.weights])
    grads = [torch.full_like(w, 1e-4) for w in made.weights]
    averages, squares = ([torch.zeros_like(g) for g in grads] for _ in range(2))
    ops.adamw_step_(bound, grads, averages, squares, counts(made), learning_rate(device, 0.5))
    for weight in bound.weights:
        torch.testing.assert_close(weight, torch.full_like(weight, -0.5), rtol=1e-2, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_run_gives_the_same_bits(device: str, channels_last: bool) -> None:
    made = with_uncoupled(mixed_case(channels_last=channels_last, device=device))
    penalty, lr = penalty_of(made, 0.4), learning_rate(device)

    def run() -> list[Tensor]:
        bound = made.bound([w.clone() for w in made.weights])
        averages, squares, steps = draw(made, 2), draw_squares(made, 3), counts(made)
        for seed in range(3):
            ops.adamw_step_(bound, draw(made, seed), averages, squares, steps, lr, penalty=penalty)
        return [*bound.weights, *averages, *squares, *ops.group_saliency(bound)]

    assert_same_bits(run)


def test_the_op_passes_opcheck(device: str) -> None:
    made = mixed_case(device=device)
    bound, one = made.bound(), torch.tensor(0.5, device=device)
    states = draw(made, 2), draw_squares(made, 3)
    lr = learning_rate(device)
    for chosen in (None, draw_mask(made.plan, 0.4)):
        arguments = (
            bound.ticket,
            draw(made, 1),
            *states,
            counts(made, 1),
            lr,
            0.9,
            0.999,
            1e-8,
            0.1,
            False,
        )
        torch.library.opcheck(
            torch.ops.ocsfast.adamw_step_.default, (*arguments, chosen, one, one, False, one, one * 0)
        )


def test_wrong_arguments_change_nothing() -> None:
    made = mixed_case()
    bound, lr, count = made.bound(), learning_rate("cpu"), len(made.weights)
    grads, averages, squares = draw(made, 1), draw(made, 2), draw_squares(made, 3)
    none: list[Tensor | None] = [None] * count
    steps = counts(made)
    tensors = [*made.weights, *averages, *squares, *steps]
    before = [t.clone() for t in tensors]
    with pytest.raises(RuntimeError, match=r"adamw_step_: exp_avgs\[0\] is missing"):
        ops.adamw_step_(bound, grads, none, squares, steps, lr)
    with pytest.raises(RuntimeError, match=r"exp_avg_sqs\[0\] is missing"):
        ops.adamw_step_(bound, grads, averages, none, steps, lr)
    with pytest.raises(RuntimeError, match=r"exp_avg_sqs\[1\] is a Double tensor"):
        ops.adamw_step_(
            bound, grads, averages, [squares[0], squares[1].double(), *squares[2:]], steps, lr
        )
    with pytest.raises(RuntimeError, match=r"steps\[4\] is Double, expected Float"):
        ops.adamw_step_(bound, grads, averages, squares, [*steps[:4], steps[4].double(), *steps[5:]], lr)
    with pytest.raises(ValueError, match="11 tensors for 12 weights"):
        ops.adamw_step_(bound, grads, averages, squares, steps[1:], lr)
    with pytest.raises(RuntimeError, match="beta2 is 1, expected 0 or more and below 1"):
        ops.adamw_step_(bound, grads, averages, squares, steps, lr, betas=(0.9, 1.0))
    with pytest.raises(RuntimeError, match="beta1 is nan"):
        ops.adamw_step_(bound, grads, averages, squares, steps, lr, betas=(float("nan"), 0.9))
    with pytest.raises(RuntimeError, match="lr is Float, expected Double"):
        ops.adamw_step_(bound, grads, averages, squares, steps, lr.float())
    with pytest.raises(ValueError, match="3 tensors for 12 weights"):
        ops.adamw_step_(bound, grads, averages[:3], squares, steps, lr)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def test_averages_are_never_copied() -> None:
    """What is written to a copy would be lost: other strides than the weight's are refused."""
    made = mixed_case(channels_last=True)
    bound, grads, squares = made.bound(), draw(made, 1), draw_squares(made, 3)
    averages = [t.contiguous() for t in draw(made, 2)]
    with pytest.raises(RuntimeError, match=r"exp_avgs\[0\] is a Float tensor .* strides"):
        ops.adamw_step_(bound, grads, averages, squares, counts(made), learning_rate("cpu"))
