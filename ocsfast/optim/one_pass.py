"""How an optimizer takes its parameters through one pass of a kernel, whatever its rule."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ocsfast.core.families import Families
from ocsfast.core.memory_format import is_dense
from ocsfast.ops import functions as ops
from ocsfast.ops.bound import Bound
from ocsfast.ops.capture import is_capturing
from ocsfast.ops.extension import MISSING, build_info
from ocsfast.ops.planning import build_plan
from ocsfast.optim.scalars import scalar

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

ParamGroup = dict[str, Any]
Gradients = list[Tensor | None]


@dataclass(frozen=True, eq=False)
class Scaling:
    """What `torch.amp.GradScaler` tells an optimizer that unscales by itself; None where it does not."""

    grad_scale: Tensor | None = None  # what gradients are divided by
    found_inf: Tensor | None = None  # not 0: the step is to be skipped

    def on(self, device: torch.device) -> Scaling:
        """As the kernels take it: 0-dim float32 on their device."""
        scalars = (self.grad_scale, self.found_inf)
        return Scaling(
            *(None if s is None else s.to(device, torch.float32).reshape(()) for s in scalars)
        )


# Steps bound weights: by their gradients, at a learning rate (0-dim float64), with a penalty or without.
ByKernel = Callable[[Bound, Gradients, Tensor, ParamGroup, ops.Penalty | None, Scaling], None]
# Steps parameters as torch does, one by one.
ByTorch = Callable[[Sequence[Tensor], ParamGroup], None]


@dataclass(frozen=True, eq=False)
class _Walk:
    """Some parameters of a param group as they lie in memory now: those a kernel steps, and the rest."""

    parameters: tuple[nn.Parameter, ...]
    pointers: tuple[int, ...]
    bound: Bound
    rest: tuple[nn.Parameter, ...]  # for torch's own path

    def is_current(self, parameters: Sequence[nn.Parameter]) -> bool:
        return same_objects(parameters, self.parameters) and self.pointers == _pointers(parameters)


class Passes:
    """An optimizer's parameters as a kernel walks them, and what a pruner wants of the next step."""

    def __init__(self) -> None:
        self._walks: dict[int, _Walk] = {}
        self.penalties: Mapping[int, tuple[Bound, ops.Penalty]] = {}

    def step(
        self,
        param_groups: Sequence[ParamGroup],
        by_kernel: ByKernel,
        by_torch: ByTorch,
        scaling: Scaling,
    ) -> None:
        """Step each parameter once: with the penalty of its param group, if there is one."""

        def one_by_one(parameters: Sequence[Tensor], param_group: ParamGroup) -> None:
            if parameters and not unscale(parameters, scaling):
                by_torch(parameters, param_group)

        penalties, self.penalties = self.penalties, {}
        for number, param_group in enumerate(param_groups):
            rest = param_group["params"]
            if number in penalties:
                bound, penalty = penalties[number]
                _step_bound(bound, param_group, penalty, by_kernel, one_by_one, scaling)
                if len(bound.weights) == len(rest):  # as a rule it is bound to the whole param group
                    continue
                done = {id(w) for w in bound.weights}
                rest = [p for p in rest if id(p) not in done]
            if rest:
                walk = self._walk(number, rest)
                _step_bound(walk.bound, param_group, None, by_kernel, one_by_one, scaling)
                one_by_one(walk.rest, param_group)

    def _walk(self, number: int, parameters: Sequence[nn.Parameter]) -> _Walk:
        walk = self._walks.get(number)
        if walk is None or not walk.is_current(parameters):
            require_begun(parameters[0].device)
            walked = [p for p in parameters if walkable(p, parameters[0])]
            done = {id(p) for p in walked}
            named = {str(k): p for k, p in enumerate(walked)}
            plan = build_plan(Families((), (), (), (), ()), named, others=named)
            walk = self._walks[number] = _Walk(
                tuple(parameters),
                _pointers(parameters),
                Bound(plan, walked),
                tuple(p for p in parameters if id(p) not in done),
            )
        return walk


def _step_bound(
    bound: Bound,
    param_group: ParamGroup,
    penalty: ops.Penalty | None,
    by_kernel: ByKernel,
    by_torch: ByTorch,
    scaling: Scaling,
) -> None:
    device = bound.plan.tables.device
    lr = param_group["lr"]
    if isinstance(lr, Tensor) and lr.device != device and is_capturing(device):
        raise RuntimeError(
            f"lr is a tensor on {lr.device}, and a CUDA graph would keep its value of now: "
            f"put it on {device} before the capture"
        )
    rate = scalar(lr, device, torch.float64)
    grads: Gradients = [w.grad for w in bound.weights]
    if any([g is not None and g.layout is not torch.strided for g in grads]):  # noqa: C419  faster so
        by_torch([w for w, g in zip(bound.weights, grads, strict=True) if is_sparse(g)], param_group)
        grads = [None if is_sparse(g) else g for g in grads]
    by_kernel(bound, grads, rate, param_group, penalty, scaling.on(device))


def states_of(optimizer: Optimizer, bound: Bound, grads: Gradients) -> list[dict[str, Tensor] | None]:
    """What an optimizer keeps of each weight; None of those without a gradient."""
    state = optimizer.state
    return [None if g is None else state[w] for w, g in zip(bound.weights, grads, strict=True)]


def matching_states(
    bound: Bound, states: Sequence[Mapping[str, Tensor] | None], key: str
) -> list[Tensor | None]:
    """What each weight's state holds, if anything, with its strides: a loaded one may have others.

    Args:
        bound: the weights.
        states: of each weight, as its optimizer keeps it; None is left out.
        key: the name of what is wanted.
    """
    values = [None if state is None else state.get(key) for state in states]
    if same_objects(values, bound.fitting.get(key, ())):
        return values
    for k, (weight, value) in enumerate(zip(bound.weights, values, strict=True)):
        if value is None or value.stride() == weight.stride() or value.shape != weight.shape:
            continue
        require_begun(weight.device)
        copy = torch.empty_like(weight, dtype=value.dtype).copy_(value)
        cast(dict[str, Tensor], states[k])[key] = values[k] = copy
    bound.fitting[key] = values
    return values


def same_objects(a: Sequence[object], b: Sequence[object]) -> bool:
    """Whether two lists hold the very same objects."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def walkable(parameter: Tensor, other: Tensor) -> bool:
    """Whether a kernel can step a parameter in one call with another one."""
    device = parameter.device
    if MISSING is not None:
        return False
    known = device.type == "cpu" or (device.type == "cuda" and bool(build_info()["cuda"]))
    return (
        known
        and device == other.device
        and parameter.dtype in _DTYPES
        and parameter.layout is torch.strided
        and is_dense(parameter)
    )


def _pointers(parameters: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([p.data_ptr() if p.layout is torch.strided else 0 for p in parameters])


def is_sparse(grad: Tensor | None) -> bool:
    """Whether there is a gradient that names the rows it touches: no kernel walks it."""
    return grad is not None and grad.layout is not torch.strided


def unscale(parameters: Sequence[Tensor], scaling: Scaling) -> bool:
    """Divide gradients by the loss's scale, in place; or say that their step is to be skipped.

    For what no kernel steps: this reads the device.
    """
    if scaling.found_inf is not None and bool(scaling.found_inf):
        return True
    for p in parameters if scaling.grad_scale is not None else ():
        if p.grad is not None and scaling.grad_scale is not None:
            p.grad.div_(scaling.grad_scale.to(p.grad.device))
    return False


def require_begun(device: torch.device) -> None:
    """Refuse to begin what an optimizer keeps in a CUDA graph, whose every replay would begin it anew.

    Raises:
        RuntimeError: a graph is being captured.
    """
    if is_capturing(device):
        raise RuntimeError(
            "the optimizer's state begins in a CUDA graph that is being captured, and would begin anew "
            "at every replay: take a step before the capture, with the same gradients present"
        )


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """The loss of a closure, which computes gradients."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def scaling_of(optimizer: Optimizer) -> Scaling:
    """What a GradScaler has told an optimizer for this step."""
    return Scaling(getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))
