"""A step of SGD with Eq. 8 before and Eq. 9 after it, against plain torch and against float64."""

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
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.8, "maximize": True},
]


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
    momenta: list[Tensor | None] = list(draw(made, 2)) if "momentum" in settings else [None] * len(grads)
    grads[2] = momenta[2] = None
    first = [1, 4] if "momentum" in settings else []
    penalty, lr = penalty_of(made, share), torch.tensor(0.1, dtype=torch.float64, device=device)

    def run(step: Any, case: Case) -> list[Tensor]:
        like = case.weights[0]
        bound = case.bound([w.clone() for w in case.weights])
        copies = [None if m is None else m.to(like.dtype, copy=True) for m in momenta]
        own = [None if g is None else g.to(like.dtype, copy=True) for g in grads]
        step(bound, own, copies, lr, first=first, penalty=penalty, **settings)
        return [*bound.weights, *(m for m in copies if m is not None)]

    results = [run(ops.sgd_step_, made), run(reference.sgd_step_, made)]
    exact = run(reference.sgd_step_, as_double(made))
    for ours, torchs, right in zip(*results, exact, strict=True):
        # The addends are about 1, and may cancel.
        assert_as_good_as_torch(ours.cpu(), torchs.cpu(), right.cpu(), atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_leaves_the_squares_of_the_new_weights(device: str, dtype: torch.dtype) -> None:
    made = with_uncoupled(mixed_case(dtype, device=device))
    bound, grads = made.bound(), draw(made, 1)
    grads_but_one: list[Tensor | None] = [None, *grads[1:]]
    lr = torch.tensor(0.1, dtype=torch.float64, device=device)
    ops.sgd_step_(bound, grads_but_one, [None] * len(grads), lr, penalty=penalty_of(made, 0.4))
    assert bound.knows()
    left = ops.group_saliency(bound)
    bound.forget()
    for ours, anew in zip(left, ops.group_saliency(bound), strict=True):
        torch.testing.assert_close(ours, anew, rtol=1e-6, atol=0)
    ops.sgd_step_(bound, grads_but_one, [None] * len(grads), lr)
    assert not bound.knows()


def test_what_cannot_be_used_is_not_read(device: str) -> None:
    """A momentum that has yet to begin, and whatever stands beside a weight without a gradient."""
    made = mixed_case(device=device)
    made.weights[0].view(-1)[3] = float("inf")
    grads: list[Tensor | None] = [None, *draw(made, 1)[1:]]
    momenta = [None if g is None else torch.full_like(g, float("nan")) for g in grads]
    lr = torch.tensor(0.1, dtype=torch.float64, device=device)
    expected = [w.clone() for w in made.weights]
    reference.sgd_step_(
        made.bound(expected), grads, [*momenta], lr, first=range(len(grads)), momentum=0.9, penalty=None
    )
    bound, every = made.bound(), draw_mask(made.plan, 0.0)
    one = torch.tensor(0.5, device=device)
    ops.sgd_step_(
        bound,
        grads,
        [None if m is None else torch.full_like(m, float("nan")) for m in momenta],
        lr,
        first=range(len(grads)),
        momentum=0.9,
        penalty=ops.Penalty(every, one, one),
    )
    for a, b in zip(bound.weights, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_an_empty_mask_leaves_right_squares_behind(device: str) -> None:
    made = mixed_case(device=device)
    bound, none = made.bound(), draw_mask(made.plan, 0.0)
    ops.lasso_grad_(bound, draw(made, 1), none, torch.tensor(0.5, device=device))
    expected = ops.group_saliency(made.bound())[0]
    assert torch.equal(ops.group_saliency(bound)[0], expected)
    mask = draw_mask(made.plan, 1.0)
    ops.shrink_(bound, mask, torch.tensor(0.5, device=device))
    assert bound.knows(mask)
    mask[0] = False
    assert not bound.knows(mask)


def test_what_shrink_leaves_is_what_the_next_lasso_needs(device: str) -> None:
    made = mixed_case(device=device)
    penalty = penalty_of(made, 0.4)
    assert penalty is not None
    bound, other = made.bound(), made.bound([w.clone() for w in made.weights])
    results = []
    for one in (bound, other):
        ops.shrink_(one, penalty.mask, penalty.factor)
        if one is other:
            one.forget()
        assert one.knows(penalty.mask) == (one is bound)
        assert not one.knows()
        assert not one.knows(penalty.mask.clone())
        grads = draw(made, 1)
        ops.lasso_grad_(one, grads, penalty.mask, penalty.lam)
        results.append(grads)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_run_gives_the_same_bits(device: str, channels_last: bool) -> None:
    made = with_uncoupled(mixed_case(channels_last=channels_last, device=device))
    penalty, lr = penalty_of(made, 0.4), torch.tensor(0.1, dtype=torch.float64, device=device)

    def run() -> list[Tensor]:
        bound, momenta = made.bound([w.clone() for w in made.weights]), draw(made, 2)
        for seed in range(3):
            ops.sgd_step_(bound, draw(made, seed), momenta, lr, momentum=0.9, penalty=penalty)
        return [*bound.weights, *momenta, *ops.group_saliency(bound)]

    assert_same_bits(run)


def test_the_op_passes_opcheck(device: str) -> None:
    made = mixed_case(device=device)
    bound, one = made.bound(), torch.tensor(0.5, device=device)
    mask, lr = draw_mask(made.plan, 0.4), torch.tensor(0.1, dtype=torch.float64, device=device)
    for chosen in (None, mask):
        arguments = (bound.ticket, draw(made, 1), draw(made, 2), [0], lr, 0.9, 0.0, 0.1, True, False)
        torch.library.opcheck(
            torch.ops.ocsfast.sgd_step_.default,
            (*arguments, chosen, one, one, False, one, one * 0),
        )


def test_a_mask_wants_both_numbers(device: str) -> None:
    made = mixed_case(device=device)
    bound, mask, one = made.bound(), draw_mask(made.plan, 0.4), torch.tensor(0.5)
    lr, none = (
        torch.tensor(0.1, dtype=torch.float64),
        [made.plan.tables.new_empty(0)] * len(made.weights),
    )
    call = (bound.ticket, draw(made, 1), none, [], lr, 0.0, 0.0, 0.0, False, False, mask)
    step = torch.ops.ocsfast.sgd_step_.default
    for lam, factor, missing in ((None, one, "lam"), (one, None, "factor")):
        with pytest.raises(RuntimeError, match=f"sgd_step_: {missing} is missing beside a mask"):
            step(*call, lam, factor, False, None, None)
    step(*call, one, one, False, None, None)


@pytest.mark.parametrize("kind", ["sgd_step_", "adamw_step_", "lasso_grad_", "shrink_"])
def test_numbers_may_lie_on_the_cpu(device: str, kind: str) -> None:
    """With the bits that they have on the weights' device."""
    results = []
    for place in ("cpu", device):
        made = mixed_case(device=device)
        bound, mask, grads = made.bound(), draw_mask(made.plan, 0.4), draw(made, 1)
        lam, factor = torch.tensor(0.3, device=place), torch.tensor(0.9, device=place)
        lr, penalty = (
            torch.tensor(0.1, dtype=torch.float64, device=place),
            ops.Penalty(mask, lam, factor),
        )
        momenta, squares = draw(made, 2), [t.square() for t in draw(made, 3)]
        if kind == "sgd_step_":
            ops.sgd_step_(bound, grads, momenta, lr, momentum=0.9, penalty=penalty)
        elif kind == "adamw_step_":
            counts = [torch.ones((), device=device) for _ in grads]
            ops.adamw_step_(bound, grads, momenta, squares, counts, lr, penalty=penalty)
        elif kind == "lasso_grad_":
            ops.lasso_grad_(bound, grads, mask, lam)
        else:
            ops.shrink_(bound, mask, factor)
        results.append([*bound.weights, *grads, *momenta, *squares])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_wrong_arguments_change_nothing() -> None:
    made = mixed_case()
    bound, lr = made.bound(), torch.tensor(0.1, dtype=torch.float64)
    grads, none = draw(made, 1), [None] * len(made.weights)
    before = [w.clone() for w in made.weights]
    with pytest.raises(RuntimeError, match=r"momenta\[0\] is missing"):
        ops.sgd_step_(bound, grads, none, lr, momentum=0.9)
    with pytest.raises(RuntimeError, match=r"momenta\[0\] is given, but momentum is 0"):
        ops.sgd_step_(bound, grads, draw(made, 2), lr)
    with pytest.raises(RuntimeError, match="lr is Float, expected Double"):
        ops.sgd_step_(bound, grads, none, lr.float())
    with pytest.raises(RuntimeError, match="first holds 99 of 12"):
        ops.sgd_step_(bound, grads, none, lr, first=[99])
    with pytest.raises(RuntimeError, match=r"grads\[3\] is a Double tensor"):
        ops.sgd_step_(bound, [*grads[:3], grads[3].double(), *grads[4:]], none, lr)
    with pytest.raises(ValueError, match="3 tensors for 12 weights"):
        ops.sgd_step_(bound, grads[:3], none, lr)
    assert all(torch.equal(a, b) for a, b in zip(before, made.weights, strict=True))
