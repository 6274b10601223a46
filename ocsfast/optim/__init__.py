"""SGD and AdamW in one pass over all they touch, with the penalty of pruning in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from ocsfast.core.errors import ConfigError
from ocsfast.ops import functions as ops
from ocsfast.ops.capture import is_capturing
from ocsfast.optim.one_pass import Gradients, Group, Passes, Scaling, beside, is_sparse, require_begun


class SGD(torch.optim.SGD):
    """A drop-in for `torch.optim.SGD` whose step is one pass: 20 bytes a float32 parameter, no more.

    Equal to it to rounding, with the same parameter groups, hooks and state: a state dict of one
    loads into the other. While a `Pruner` shrinks weights, its penalty (Eq. 8 before, Eq. 9 after the
    step) and the norms for the next step are taken in the same pass, instead of in two more; nothing
    has to be said for that but to use this class.

    Dense float32, bfloat16, float16 and float64 parameters on the CPU or, where the extension has CUDA
    kernels, on CUDA are stepped by a kernel of ocsfast, in one launch a parameter group. Sparse
    gradients, other dtypes, devices and layouts take torch's own single-tensor path.

    In a CUDA graph a step can be captured once its state exists; a learning rate that is to change must
    be a tensor on the device.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as for `torch.optim.SGD`.
        fused: as there, whether `torch.amp.GradScaler` leaves it to the step to unscale gradients and to
            skip: nothing is read from the device then, and `.grad` stays scaled. The step is one pass in
            any case.
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

    def penalize(self, penalties: Mapping[int, tuple[ops.Bound, ops.Penalty]]) -> None:
        """Apply penalties in the next step: the number of a parameter group -> bound weights of it, and
        what is to happen to them. A pruner calls this before each step."""
        self._passes.penalties = penalties

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure` evaluates the model again and returns the loss."""
        loss = _evaluate(closure)
        self._passes.step(self.param_groups, self._by_kernel, self._by_torch, _scaling(self))
        return loss

    def _by_kernel(
        self,
        bound: ops.Bound,
        grads: Gradients,
        lr: Tensor,
        group: Group,
        penalty: ops.Penalty | None,
        scaling: Scaling,
    ) -> None:
        momenta: list[Tensor | None] = [None] * len(grads)
        new: dict[int, Tensor] = {}
        if group["momentum"] != 0:
            for k, (weight, grad) in enumerate(zip(bound.weights, grads, strict=True)):
                if grad is None:
                    continue
                momenta[k] = beside(weight, bound.strides[k], self.state[weight], "momentum_buffer")
                if momenta[k] is None:
                    momenta[k] = new[k] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        if new:
            require_begun(bound.plan.tables.device)
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
            grad_scale=scaling.grad_scale,
            found_inf=scaling.found_inf,
        )
        if new and group["dampening"] != 0 and scaling.found_inf is not None and bool(scaling.found_inf):
            return  # the first gradient, which is not dampened, has yet to come
        for k, buffer in new.items():
            self.state[bound.weights[k]]["momentum_buffer"] = buffer

    def _by_torch(self, parameters: Sequence[Tensor], group: Group) -> None:
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


class AdamW(torch.optim.AdamW):
    """A drop-in for `torch.optim.AdamW` whose step is one pass: 28 bytes a float32 parameter, no more.

    All that is said of `SGD` above holds here: equal to torch's to rounding, one state dict for both,
    and the pruner's penalty in the same pass. Eq. 8 is added to the gradient before it is averaged,
    as it is without this class.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as for `torch.optim.AdamW`.
        amsgrad: must be False, in parameter groups and state dicts too.
        fused: as for `SGD`.
        capturable: must be True to capture a step in a CUDA graph, as for `torch.optim.AdamW`. Steps are
            counted beside their weights in any case.

    Raises:
        ConfigError: amsgrad is True.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        fused: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            capturable=capturable,
            fused=fused or None,
        )
        self._passes = Passes()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._passes = Passes()
        for parameter, own in self.state.items():
            if "step" in own and isinstance(parameter, Tensor):  # torch counts on the CPU, or the device
                own["step"] = own["step"].to(parameter.device, torch.float32).reshape(())

    def state_dict(self) -> dict[str, Any]:
        """As torch's: with counts on the CPU, where torch would read them one by one."""
        packed = super().state_dict()
        for group in packed["param_groups"]:
            for k in group["params"] if not (group["capturable"] or group["fused"]) else ():
                own = packed["state"].get(k, {})
                if "step" in own:
                    packed["state"][k] = {**own, "step": own["step"].cpu()}
        return packed

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        _refuse_amsgrad([{**self.defaults, **param_group}])
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        _refuse_amsgrad(state_dict["param_groups"])
        super().load_state_dict(state_dict)

    def penalize(self, penalties: Mapping[int, tuple[ops.Bound, ops.Penalty]]) -> None:
        """As for `SGD`."""
        self._passes.penalties = penalties

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure` evaluates the model again and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse, or a CUDA graph is captured that cannot be. Nothing has
                been changed then.
        """
        for group in self.param_groups:
            if not group["capturable"] and group["params"] and is_capturing(group["params"][0].device):
                raise RuntimeError(
                    "AdamW.step is called while a CUDA graph is captured, but a parameter group's "
                    "capturable is False: make the optimizer with capturable=True"
                )
        loss = _evaluate(closure)
        if any(is_sparse(p.grad) for group in self.param_groups for p in group["params"]):
            raise RuntimeError("AdamW does not support sparse gradients: use torch.optim.SparseAdam")
        self._passes.step(self.param_groups, self._by_kernel, self._by_torch, _scaling(self))
        return loss

    def _by_kernel(
        self,
        bound: ops.Bound,
        grads: Gradients,
        lr: Tensor,
        group: Group,
        penalty: ops.Penalty | None,
        scaling: Scaling,
    ) -> None:
        averages: list[Tensor | None] = [None] * len(grads)
        squares: list[Tensor | None] = [None] * len(grads)
        stepped = [k for k, grad in enumerate(grads) if grad is not None]
        new: dict[int, dict[str, Tensor]] = {}
        steps: list[Tensor | None] = [None] * len(grads)
        for k in stepped:
            weight = bound.weights[k]
            state = self.state[weight]
            if not state:
                state = new[k] = {
                    "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                    "exp_avg": torch.zeros_like(weight, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(weight, memory_format=torch.preserve_format),
                }
            averages[k] = beside(weight, bound.strides[k], state, "exp_avg")
            squares[k] = beside(weight, bound.strides[k], state, "exp_avg_sq")
            if state["step"].device != weight.device or state["step"].dtype != torch.float32:
                require_begun(weight.device)
                state["step"] = state["step"].to(weight.device, torch.float32)  # torch's path began it
            steps[k] = state["step"]
        if new:
            require_begun(bound.plan.tables.device)
        ops.adamw_step_(
            bound,
            grads,
            averages,
            squares,
            steps,
            lr,
            betas=(float(group["betas"][0]), float(group["betas"][1])),
            eps=group["eps"],
            weight_decay=float(group["weight_decay"]),
            maximize=group["maximize"],
            penalty=penalty,
            grad_scale=scaling.grad_scale,
            found_inf=scaling.found_inf,
        )
        for k, state in new.items():
            self.state[bound.weights[k]] = state

    def _by_torch(self, parameters: Sequence[Tensor], group: Group) -> None:
        stepped: list[Tensor] = []
        grads: list[Tensor] = []
        averages: list[Tensor] = []
        squares: list[Tensor] = []
        counters: list[Tensor] = []
        chosen = {**group, "params": parameters, "fused": None}
        has_complex = self._init_group(chosen, stepped, grads, averages, squares, [], counters)  # type: ignore[no-untyped-call]
        if not stepped:
            return
        adam(
            stepped,
            grads,
            averages,
            squares,
            [],
            counters,
            has_complex=has_complex,
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            decoupled_weight_decay=True,
        )


# Those that apply a pruner's penalty in their own pass.
OnePass: TypeAlias = SGD | AdamW


def _scaling(optimizer: OnePass) -> Scaling:
    return Scaling(getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _refuse_amsgrad(groups: Iterable[Mapping[str, Any]]) -> None:
    if any(group.get("amsgrad", False) for group in groups):
        raise ConfigError(
            "amsgrad=True is not what ocsfast.optim.AdamW can do: leave it out, or use torch.optim.AdamW"
        )
