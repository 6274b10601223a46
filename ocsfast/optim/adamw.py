"""AdamW in one pass over all that it touches, with the penalty of pruning in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from ocsfast.core.errors import ConfigError
from ocsfast.ops import functions as ops
from ocsfast.ops.bound import Bound
from ocsfast.ops.capture import is_capturing
from ocsfast.optim.one_pass import (
    Gradients,
    ParamGroup,
    Passes,
    Scaling,
    evaluate,
    is_sparse,
    matching_states,
    require_begun,
    same_objects,
    scaling_of,
    states_of,
)


class AdamW(torch.optim.AdamW):
    """A drop-in for `torch.optim.AdamW` whose step is one pass: 28 bytes a float32 parameter, no more.

    All that is said of `ocsfast.optim.SGD` holds here: equal to torch's to rounding, one state dict for
    both, and the pruner's penalty in the same pass. Eq. 8 is added to the gradient before that is
    averaged, as it is without this class.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as for `torch.optim.AdamW`.
        amsgrad: must be False, in param groups and state dicts too.
        fused: whether `torch.amp.GradScaler` leaves it to the step to unscale gradients and to skip.
        capturable: must be True to capture a step in a CUDA graph, as for `torch.optim.AdamW`. Steps are
            counted on their weights' device in any case.

    Raises:
        ConfigError: amsgrad is True.

    Examples:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = AdamW(layer.parameters(), lr=0.5, weight_decay=0)
        >>> before = layer.weight.detach().clone()
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> torch.allclose(layer.weight, before - 0.5)  # the first step is lr times the gradient's sign
        True
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
        for param_group in packed["param_groups"]:
            for k in (
                param_group["params"] if not (param_group["capturable"] or param_group["fused"]) else ()
            ):
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

    def penalize(self, penalties: Mapping[int, tuple[Bound, ops.Penalty]]) -> None:
        """As for `SGD`."""
        self._passes.penalties = penalties

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure` evaluates the model again and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse, or a CUDA graph is captured that cannot be. Nothing has
                been changed then.
        """
        for param_group in self.param_groups:
            if (
                not param_group["capturable"]
                and param_group["params"]
                and is_capturing(param_group["params"][0].device)
            ):
                raise RuntimeError(
                    "AdamW.step is called while a CUDA graph is captured, but a param group's "
                    "capturable is False: make the optimizer with capturable=True"
                )
        loss = evaluate(closure)
        params = (p for param_group in self.param_groups for p in param_group["params"])
        if any([is_sparse(p.grad) for p in params]):  # noqa: C419  faster so
            raise RuntimeError("AdamW does not support sparse gradients: use torch.optim.SparseAdam")
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
        states = states_of(self, bound, grads)
        new = {
            k: _begun(bound.weights[k]) for k, own in enumerate(states) if own is not None and not own
        }
        if new:
            require_begun(bound.plan.tables.device)
        for k, begun in new.items():
            states[k] = begun
        averages, squares = (matching_states(bound, states, key) for key in ("exp_avg", "exp_avg_sq"))
        counts = _counts(bound, states)
        step_adamw(bound, grads, (averages, squares, counts), lr, param_group, penalty, scaling)
        for k, state in new.items():
            self.state[bound.weights[k]] = state

    def _by_torch(self, parameters: Sequence[Tensor], param_group: ParamGroup) -> None:
        stepped: list[Tensor] = []
        grads: list[Tensor] = []
        averages: list[Tensor] = []
        squares: list[Tensor] = []
        counters: list[Tensor] = []
        chosen = {**param_group, "params": parameters, "fused": None}
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
            beta1=param_group["betas"][0],
            beta2=param_group["betas"][1],
            lr=param_group["lr"],
            weight_decay=param_group["weight_decay"],
            eps=param_group["eps"],
            maximize=param_group["maximize"],
            decoupled_weight_decay=True,
        )


def step_adamw(
    bound: Bound,
    grads: Gradients,
    states: tuple[Gradients, Gradients, Gradients],
    lr: Tensor,
    param_group: ParamGroup,
    penalty: ops.Penalty | None,
    scaling: Scaling,
) -> None:
    """`ocsfast.ops.functions.adamw_step_` by the settings of a param group.

    Args:
        states: moving averages, those of squares, and counts of steps.
    """
    ops.adamw_step_(
        bound,
        grads,
        *states,
        lr,
        betas=(float(param_group["betas"][0]), float(param_group["betas"][1])),
        eps=param_group["eps"],
        weight_decay=float(param_group["weight_decay"]),
        maximize=param_group["maximize"],
        penalty=penalty,
        grad_scale=scaling.grad_scale,
        found_inf=scaling.found_inf,
    )


def _begun(weight: Tensor) -> dict[str, Tensor]:
    """A weight's state before its first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=weight.device),
        "exp_avg": torch.zeros_like(weight, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(weight, memory_format=torch.preserve_format),
    }


def _counts(bound: Bound, states: Sequence[dict[str, Tensor] | None]) -> list[Tensor | None]:
    """Each weight's count of steps, as the kernel takes it."""
    counts = [None if own is None else own["step"] for own in states]
    if same_objects(counts, bound.fitting.get("step", ())):
        return counts
    device = bound.plan.tables.device
    for k, (own, count) in enumerate(zip(states, counts, strict=True)):
        if own is None or count is None or (count.device, count.dtype) == (device, torch.float32):
            continue
        require_begun(device)
        own["step"] = counts[k] = count.to(device, torch.float32)  # torch's path began it
    bound.fitting["step"] = counts
    return counts


def _refuse_amsgrad(param_groups: Iterable[Mapping[str, Any]]) -> None:
    if any(param_group.get("amsgrad", False) for param_group in param_groups):
        raise ConfigError(
            "amsgrad=True is not what ocsfast.optim.AdamW can do: leave it out, or use torch.optim.AdamW"
        )
