"""SGD in one pass over all that it touches, with the penalty of pruning in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from ocsfast.ops import functions as ops
from ocsfast.ops.bound import Bound
from ocsfast.optim.one_pass import (
    Gradients,
    ParamGroup,
    Passes,
    Scaling,
    evaluate,
    is_sparse,
    matching_states,
    require_begun,
    scaling_of,
    states_of,
)


class SGD(torch.optim.SGD):
    """A drop-in for `torch.optim.SGD` whose step is one pass: 20 bytes a float32 parameter, no more.

    Equal to it to rounding, with the same param groups, hooks and state: a state dict of one
    loads into the other. While a `Pruner` shrinks weights, its penalty (Eq. 8 before, Eq. 9 after the
    step) and the norms for the next step are taken in the same pass, instead of in two more. Using this
    class is all it takes.

    Dense float32, bfloat16, float16 and float64 parameters on the CPU or, where the extension has CUDA
    kernels, on CUDA are stepped by a kernel of ocsfast, in one launch for each param group. Sparse
    gradients, other dtypes, devices and layouts take torch's own single-tensor path.

    In a CUDA graph a step can be captured once its state exists; a learning rate that is to change must
    be a tensor on the device.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as for `torch.optim.SGD`.
        fused: as there, whether `torch.amp.GradScaler` leaves it to the step to unscale gradients and to
            skip: nothing is read from the device then, and `.grad` stays scaled. The step is one pass in
            any case.

    Examples:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = SGD(layer.parameters(), lr=0.5)
        >>> before = layer.weight.detach().clone()
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> torch.allclose(layer.weight, before - 0.5)
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        fused: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            fused=fused or None,
        )
        self._passes = Passes()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._passes = Passes()

    def penalize(self, penalties: Mapping[int, tuple[Bound, ops.Penalty]]) -> None:
        """Apply penalties in the next step; a pruner calls this before each one.

        Args:
            penalties: by the number of a param group: bound weights of it, and what happens to them.
        """
        self._passes.penalties = penalties

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure` evaluates the model again and returns the loss."""
        loss = evaluate(closure)
        self._passes.step(self.param_groups, self._by_kernel, self._by_torch, scaling_of(self))
        return loss

    def _by_kernel(
        self,
        bound: Bound,
        grads: Gradients,
        lr: Tensor,
        param_group: ParamGroup,
        penalty: ops.Penalty | None,
        scaling: Scaling,
    ) -> None:
        momenta: list[Tensor | None] = [None] * len(grads)
        new: dict[int, Tensor] = {}
        if param_group["momentum"] != 0:
            momenta = matching_states(bound, states_of(self, bound, grads), "momentum_buffer")
            begins = [k for k, m in enumerate(momenta) if m is None and grads[k] is not None]
            if begins:
                require_begun(bound.plan.tables.device)
            for k in begins:
                momenta[k] = new[k] = torch.zeros_like(
                    bound.weights[k], memory_format=torch.preserve_format
                )
        step_sgd(bound, grads, momenta, lr, param_group, penalty, scaling, first=list(new))
        skipped = scaling.found_inf
        if new and param_group["dampening"] != 0 and skipped is not None and bool(skipped):
            return  # the first gradient, which is not dampened, has yet to come
        for k, buffer in new.items():
            self.state[bound.weights[k]]["momentum_buffer"] = buffer

    def _by_torch(self, parameters: Sequence[Tensor], param_group: ParamGroup) -> None:
        stepped = [p for p in parameters if p.grad is not None]
        if not stepped:
            return
        buffers = [self.state[p].get("momentum_buffer") for p in stepped]
        sgd(
            stepped,
            [p.grad for p in stepped if p.grad is not None],
            buffers,
            has_sparse_grad=any(is_sparse(p.grad) for p in stepped),
            foreach=False,
            weight_decay=param_group["weight_decay"],
            momentum=param_group["momentum"],
            lr=param_group["lr"],
            dampening=param_group["dampening"],
            nesterov=param_group["nesterov"],
            maximize=param_group["maximize"],
        )
        if param_group["momentum"] != 0:
            for parameter, buffer in zip(stepped, buffers, strict=True):
                self.state[parameter]["momentum_buffer"] = buffer


def step_sgd(
    bound: Bound,
    grads: Gradients,
    momenta: Gradients,
    lr: Tensor,
    param_group: ParamGroup,
    penalty: ops.Penalty | None,
    scaling: Scaling,
    first: Sequence[int] = (),
) -> None:
    """`ocsfast.ops.functions.sgd_step_` by the settings of a param group."""
    ops.sgd_step_(
        bound,
        grads,
        momenta,
        lr,
        first=first,
        momentum=float(param_group["momentum"]),
        dampening=float(param_group["dampening"]),
        weight_decay=float(param_group["weight_decay"]),
        nesterov=param_group["nesterov"],
        maximize=param_group["maximize"],
        penalty=penalty,
        grad_scale=scaling.grad_scale,
        found_inf=scaling.found_inf,
    )
