"""What walking the weights copes with: more of them than a launch takes, and odd places in memory."""

from __future__ import annotations

import torch
from helpers.builders import Case, case, draw, families, mixed_case, with_uncoupled
from torch import Tensor

from ocsfast.ops import functions as ops
from ocsfast.ops import reference
from ocsfast.ops.functions import Penalty


def assert_steps_as_the_reference(made: Case, weights: list[Tensor]) -> None:
    """Saliency, Eq. 8 and 9, and a step of each optimizer, on weights as they lie."""
    device = weights[0].device
    ours, theirs = made.bound(weights), made.bound([w.clone() for w in weights])
    mask = torch.arange(made.plan.count("groups"), device=device) % 2 == 0
    half, lr = torch.tensor(0.5, device=device), torch.tensor(0.1, dtype=torch.float64, device=device)
    penalty = Penalty(mask, half, half)
    for a, b in zip(ops.group_saliency(ours), reference.group_saliency(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    ops.shrink_(ours, mask, half)
    reference.shrink_(theirs, mask, half)
    for number, (name, states) in enumerate((("sgd_step_", 1), ("adamw_step_", 2))):
        grads = draw(made, 10 + number)
        kept = [[t.square() for t in draw(made, 20 + k)] for k in range(states)]
        copies = [[t.clone() for t in tensors] for tensors in kept]
        counts: list[list[list[Tensor]]] = [[], []]
        if name == "adamw_step_":
            counts = [[[torch.zeros((), device=device) for _ in grads]] for _ in range(2)]
        options = {"momentum": 0.9} if name == "sgd_step_" else {}
        getattr(ops, name)(ours, grads, *kept, *counts[0], lr, penalty=penalty, **options)
        getattr(reference, name)(theirs, grads, *copies, *counts[1], lr, penalty=penalty, **options)
        for own, other in zip(kept, copies, strict=True):
            for a, b in zip(own, other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    grads = draw(made, 30)
    others = [g.clone() for g in grads]
    ops.lasso_grad_(ours, grads, mask, half)
    reference.lasso_grad_(theirs, others, mask, half)
    for a, b in zip([*ours.weights, *grads], [*theirs.weights, *others], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_more_tensors_than_a_launch_takes_are_walked(device: str) -> None:
    """On CUDA pointers go by value: 1984 tensors in a launch, 1344 in one of AdamW."""
    gen = torch.Generator().manual_seed(0)
    parameters = {
        f"w{k}": torch.randn((1 + k % 5, 1 + k % 3), generator=gen).to(device) for k in range(2100)
    }
    labels = {name: {0: list(range(w.shape[0]))} for name, w in parameters.items()}
    made = case(families([5], labels), parameters)
    assert made.plan.count("tensors") == 2100
    assert_steps_as_the_reference(made, made.weights)


def test_weights_that_are_not_aligned_are_walked(device: str) -> None:
    """As parts of a larger buffer they may begin anywhere; loads of 16 bytes may not."""
    made = with_uncoupled(mixed_case(device=device))
    for offset in (1, 2, 3):
        weights = []
        for weight in made.weights:
            buffer = torch.zeros(weight.numel() + offset, device=device)
            moved = buffer[offset:].as_strided(weight.shape, weight.stride(), offset)
            weights.append(moved.copy_(weight))
        assert_steps_as_the_reference(made, weights)
