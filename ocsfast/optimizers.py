"""Optimizers: which one owns a model, whether its state can be cut, and cutting it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn, optim
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ocsfast.errors import ConfigError, StateError
from ocsfast.optim import SGD, AdamW
from ocsfast.slicing import unsliceable

# Their state can be cut, which is known before their first step.
TORCHS = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop, optim.NAdam, optim.Adagrad, optim.RAdam),
    *(optim.Adamax, optim.Adadelta, optim.Adafactor, optim.ASGD, optim.Rprop),
)
SUPPORTED = (SGD, AdamW, *TORCHS)


class StepCounter:
    """Counts the steps of every optimizer in the process, so that one can be found by its parameters.

    A step hook is the only way to learn of an optimizer that nobody passes; the count is weak and
    costs about a microsecond a step.
    """

    def __init__(self) -> None:
        self._steps: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._last: weakref.ref[Optimizer] | None = None

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        self._last = weakref.ref(optimizer)

    def last(self) -> Optimizer | None:
        """The optimizer that stepped last, if it is still alive."""
        return None if self._last is None else self._last()

    def steps(self, optimizer: Optimizer) -> int:
        """Steps of `optimizer` since ocsfast was imported."""
        return self._steps.get(optimizer, 0)

    def owners(self, parameters: Mapping[str, nn.Parameter]) -> list[Optimizer]:
        """The optimizers that have stepped and own at least one of `parameters`."""
        wanted = {id(p) for p in parameters.values()}
        return [o for o in list(self._steps) if wanted & {id(p) for p in owned(o)}]


def owned(optimizer: Optimizer) -> list[nn.Parameter]:
    """Every parameter in the optimizer's groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def find_optimizer(counter: StepCounter, trainable: Mapping[str, nn.Parameter]) -> Optimizer:
    """The one optimizer that owns the model's trainable parameters.

    Raises:
        StateError: none has stepped, none owns them, or more than one does.
    """
    owners = counter.owners(trainable)
    if not owners:
        raise StateError(
            "no optimizer step has been seen on this model's parameters: call ocsfast.step after the "
            "training steps, import ocsfast before them, or pass optimizer="
        )
    if len(owners) > 1:
        kinds = ", ".join(type(o).__name__ for o in owners)
        raise StateError(
            f"{len(owners)} optimizers own parameters of this model ({kinds}): one must own them all. "
            "Pass optimizer=, or delete the one that is no longer in use"
        )
    return owners[0]


def require_optimizer(optimizer: Optimizer) -> Optimizer:
    """What was passed as one, if it is one.

    Raises:
        ConfigError: it is not, as a scheduler or a framework's wrapper.
    """
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"optimizer={type(optimizer).__name__}: a torch.optim.Optimizer is expected")
    return optimizer


def tells_by_steps(optimizer: Optimizer) -> bool:
    """Whether it takes a first step to tell if its state can be cut."""
    return type(optimizer) not in SUPPORTED and not optimizer.state


def check_owner(optimizer: Optimizer, coupled: Mapping[str, nn.Parameter]) -> None:
    """Refuse an optimizer that does not own every one of the `coupled` parameters.

    Raises:
        StateError: naming the first parameter it does not own.
    """
    mine = {id(p) for p in owned(optimizer)}
    for name, parameter in coupled.items():
        if id(parameter) not in mine:
            raise StateError(
                f"{name} is to be pruned, but the {type(optimizer).__name__} optimizer does not own it: "
                "one optimizer must own all pruned parameters. Add it to a parameter group, or name "
                "its layer in keep="
            )


def check_supported(optimizer: Optimizer, stepped: bool) -> None:
    """Refuse an optimizer whose state could not be cut with its parameters.

    Args:
        stepped: whether it has taken a step, so that its state can be judged.

    Raises:
        StateError: naming the optimizer and what in its state cannot be sliced.
    """
    name = type(optimizer).__name__
    known = ", ".join(kind.__name__ for kind in TORCHS)
    if type(optimizer) in SUPPORTED and not optimizer.state:
        return
    if name == "ZeroRedundancyOptimizer":
        raise StateError(
            "a ZeroRedundancyOptimizer cannot be cut: it keeps parts of its state on other ranks. Use "
            "the optimizer inside it on every rank"
        )
    if not stepped and tells_by_steps(optimizer):
        raise StateError(
            f"optimizer {name} is not one of {known}, and before its first step nothing tells whether "
            "its state can be cut. Attach after the first training step"
        )
    what = unsliceable(optimizer)
    if what is not None:
        raise StateError(
            f"optimizer {name} cannot be cut: {what}. Use one of {known}, or say how with "
            "ocsfast.register_slicer"
        )


Scalar = float | Tensor  # a Tensor lies on an accelerator: reading it would wait for the device


def learning_rate(group: Mapping[str, Any]) -> Scalar:
    """A parameter group's learning rate, as a float where that costs no synchronisation."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return lr
    return float(lr)


def stands_still(optimizer: Optimizer) -> bool:
    """Whether a step moves no weight, as every learning rate is 0.

    torch.distributed.checkpoint takes such steps, to have the state that it saves or loads.
    """
    rates = (learning_rate(group) for group in optimizer.param_groups)
    return all(not isinstance(rate, Tensor) and rate == 0 for rate in rates)


def momentum_gain(group: Mapping[str, Any]) -> float:
    """1 - momentum: a constant gradient moves a weight by lr / (this) a step in the long run.

    Adam's moving average has no such gain.
    """
    momentum = group.get("momentum", 0.0)
    dampening = group.get("dampening", 0.0)
    if isinstance(momentum, Tensor) or isinstance(dampening, Tensor) or not 0 <= dampening < 1:
        return 1.0
    return (1.0 - float(momentum)) / (1.0 - float(dampening))


def same_scalar(a: Scalar, b: Scalar) -> bool:
    """Whether two learning rates are known to be equal without reading a device."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return a == b


def gradient_scale(optimizer: Optimizer) -> Tensor | None:
    """The factor by which a fused optimizer will divide the gradients in this step, if any."""
    scale = getattr(optimizer, "grad_scale", None)
    return scale if isinstance(scale, Tensor) else None


def overflowed(optimizer: Optimizer) -> Tensor | None:
    """0-dim, not 0 if a fused optimizer will skip this step by itself; None if it cannot tell."""
    found = getattr(optimizer, "found_inf", None)
    return found if isinstance(found, Tensor) else None


def register_counter() -> StepCounter:
    """Make the process's step counter and hook it into torch."""
    counter = StepCounter()
    register_optimizer_step_post_hook(counter)
    return counter


def weak_hook(method: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does not keep the pruner alive: it goes when its model goes."""
    reference = weakref.WeakMethod(method)

    def hook(*args: Any) -> Any:
        alive = reference()
        return None if alive is None else alive(*args)

    return hook


def followed_by(closure: Callable[[], Any], more: Callable[[], None]) -> Callable[[], Any]:
    """A closure that also adds the penalty to the gradients it leaves."""

    def wrapped() -> Any:
        loss = closure()
        more()
        return loss

    return wrapped
