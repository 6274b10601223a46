"""SGD in one pass over weights, gradients and momenta, with the penalty of pruning in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from ocsfast import ops
from ocsfast.grouping.families import Families
from ocsfast.plan import build_plan, is_dense

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class _Walk:
    """Some parameters of a group as they lie in memory now: those a kernel steps, and the rest."""

    parameters: tuple[nn.Parameter, ...]
    pointers: tuple[int, ...]
    bound: ops.Bound
    rest: tuple[nn.Parameter, ...]  # for torch's own path

    def is_current(self, parameters: Sequence[nn.Parameter]) -> bool:
        return (
            len(parameters) == len(self.parameters)
            and all(a is b for a, b in zip(parameters, self.parameters, strict=True))
            and self.pointers == _pointers(parameters)
        )


class SGD(torch.optim.SGD):
    """A drop-in for `torch.optim.SGD` whose step is one pass: 20 bytes a float32 parameter, no more.

    Equal to it to rounding, with the same parameter groups, hooks and state: a state dict of one
    loads into the other. While a `Pruner` shrinks weights, its penalty (Eq. 8 before, Eq. 9 after the
    step) and the norms for the next step are taken in the same pass, instead of in two more; nothing
    has to be said for that but to use this class.

    Dense float32, bfloat16, float16 and float64 parameters on the CPU or, where the extension has CUDA
    kernels, on CUDA are stepped by a kernel of ocsfast, in one launch a parameter group. Sparse
    gradients, other dtypes, devices and layouts take torch's own single-tensor path.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as for `torch.optim.SGD`.
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
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        self._reset()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset()

    def _reset(self) -> None:
        self._walks: dict[int, _Walk] = {}
        self._penalties: Mapping[int, tuple[ops.Bound, ops.Penalty]] = {}

    def penalize(self, penalties: Mapping[int, tuple[ops.Bound, ops.Penalty]]) -> None:
        """Apply penalties in the next step: the number of a parameter group -> bound weights of it, and
        what is to happen to them. A pruner calls this before each step."""
        self._penalties = penalties

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure` evaluates the model again and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        penalties, self._penalties = self._penalties, {}
        for number, group in enumerate(self.param_groups):
            rest = group["params"]
            if number in penalties:
                bound, penalty = penalties[number]
                self._step_bound(bound, group, penalty)
                if len(bound.weights) == len(rest):  # as a rule it is bound to the whole group
                    continue
                done = {id(w) for w in bound.weights}
                rest = [p for p in rest if id(p) not in done]
            if rest:
                walk = self._walk(number, rest)
                self._step_bound(walk.bound, group, None)
                self._step_by_torch(walk.rest, group)
        return loss

    def _walk(self, number: int, parameters: Sequence[nn.Parameter]) -> _Walk:
        walk = self._walks.get(number)
        if walk is None or not walk.is_current(parameters):
            walked = [p for p in parameters if walkable(p, parameters[0])]
            done = {id(p) for p in walked}
            named = {str(k): p for k, p in enumerate(walked)}
            plan = build_plan(Families((), (), (), (), ()), named, others=named)
            walk = self._walks[number] = _Walk(
                tuple(parameters),
                _pointers(parameters),
                ops.Bound(plan, walked),
                tuple(p for p in parameters if id(p) not in done),
            )
        return walk

    def _step_bound(self, bound: ops.Bound, group: dict[str, Any], penalty: ops.Penalty | None) -> None:
        lr = torch.empty((), dtype=torch.float64, device=bound.plan.tables.device)
        fill(lr, group["lr"])
        grads: list[Tensor | None] = [w.grad for w in bound.weights]
        if any(is_sparse(g) for g in grads):
            odd = [w for w, g in zip(bound.weights, grads, strict=True) if is_sparse(g)]
            self._step_by_torch(odd, group)
            grads = [None if is_sparse(g) else g for g in grads]
        momenta: list[Tensor | None] = [None] * len(grads)
        new: dict[int, Tensor] = {}
        if group["momentum"] != 0:
            for k, (weight, grad) in enumerate(zip(bound.weights, grads, strict=True)):
                if grad is None:
                    continue
                momenta[k] = self.state[weight].get("momentum_buffer")
                if momenta[k] is None:
                    momenta[k] = new[k] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        ops.sgd_step_(
            bound,
            grads,
            momenta,
            lr,
            first=list(new),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            penalty=penalty,
        )
        for k, buffer in new.items():
            self.state[bound.weights[k]]["momentum_buffer"] = buffer

    def _step_by_torch(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
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
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if group["momentum"] != 0:
            for parameter, buffer in zip(stepped, buffers, strict=True):
                self.state[parameter]["momentum_buffer"] = buffer


def walkable(parameter: Tensor, beside: Tensor) -> bool:
    """Whether the kernel can step it together with another one."""
    device = parameter.device
    known = device.type == "cpu" or (device.type == "cuda" and bool(ops.build_info()["cuda"]))
    return (
        known
        and device == beside.device
        and parameter.dtype in _DTYPES
        and parameter.layout is torch.strided
        and is_dense(parameter)
    )


def _pointers(parameters: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(p.data_ptr() if p.layout is torch.strided else 0 for p in parameters)


def is_sparse(grad: Tensor | None) -> bool:
    """Whether there is a gradient that names the rows it touches: no kernel walks it."""
    return grad is not None and grad.layout is not torch.strided


def fill(scratch: Tensor, value: float | Tensor) -> None:
    """Set a 0-dim tensor to a number, or to another one's value without reading it."""
    if isinstance(value, Tensor):
        scratch.copy_(value)
    else:
        scratch.fill_(value)
