"""Eq. 8 and Eq. 9 on a model's weights, around an optimizer's step.

Nothing here waits for the device. Lambdas and factors are 0-dim tensors, on the CPU unless a learning
rate or the clock of a captured step lies on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from ocsfast.ops.functions import lasso_grad_, shrink_
from ocsfast.optim.coupled import Part
from ocsfast.optim.one_pass import is_sparse
from ocsfast.optim.param_groups import Scalar, gradient_scale, learning_rate, momentum_gain, overflowed
from ocsfast.optim.scalars import factor_of, product, scalar


def prepare(
    parts: Sequence[Part], optimizer: Optimizer, lam: Scalar, scale: Scalar | None, penalty: str
) -> None:
    """Fill in what the coming step does to each part: Eq. 8's lambda and Eq. 9's factor.

    Args:
        parts: of the coupled weights.
        optimizer: whose param groups hold them.
        lam: lambda.
        scale: a typical slice norm. Given, Eq. 8 is scaled by it and by 1 - momentum, so that it takes
            from such a slice the same share a step as Eq. 9 does. None: Eq. 8 as written.
        penalty: `Config.settled_penalty`.
    """
    for part in parts:
        param_group = optimizer.param_groups[part.param_group]
        device = part.bound.plan.tables.device
        gain = 1.0 if scale is None else scale * momentum_gain(param_group)
        lasso, shrinks = penalty in ("both", "lasso"), penalty in ("both", "shrink")
        part.lam = product(lam, gain, device) if lasso else scalar(0.0, device)
        rate = learning_rate(param_group)  # each param group's own
        part.factor = factor_of(lam, rate, device) if shrinks else scalar(1.0, device)


def add_lasso(parts: Sequence[Part], optimizer: Optimizer, mask: Tensor) -> None:
    """Eq. 8: grad += lambda * w / |w| over the pruned slices, before the optimizer reads it."""
    unscale = gradient_scale(optimizer)
    for part in parts:
        lam = part.lam
        if unscale is not None:
            lam = lam * scalar(unscale, part.bound.plan.tables.device)
        if optimizer.param_groups[part.param_group].get("maximize", False):
            lam = -lam  # the optimizer climbs, the weights are to shrink
        # Eq. 8 would make a sparse gradient dense.
        grads = [None if is_sparse(w.grad) else w.grad for w in part.bound.weights]
        lasso_grad_(part.bound, grads, mask, lam)


def shrink(parts: Sequence[Part], optimizer: Optimizer, mask: Tensor) -> None:
    """Eq. 9: pruned slices times the factor, unless the optimizer skipped its step."""
    skipped = overflowed(optimizer)
    for part in parts:
        factor = part.factor
        if skipped is not None:
            # 1 where the step was skipped. `torch.where` would copy a factor that lies on the CPU.
            found = scalar(skipped, part.bound.plan.tables.device)
            factor = factor * (found == 0) + (found != 0)
        shrink_(part.bound, mask, factor)
