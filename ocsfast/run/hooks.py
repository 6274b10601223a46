"""What happens around an optimizer's steps: the penalty before and after each, and the count of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ocsfast.choice.freezing import Freezing
from ocsfast.core.config import Config
from ocsfast.core.errors import StateError
from ocsfast.ops import capture
from ocsfast.optim.coupled import Coupled, Part, check_identity, mean_rate, parts_now
from ocsfast.optim.coupling import coupling_of
from ocsfast.optim.param_groups import Scalar, overflowed, stands_still
from ocsfast.optim.penalty import prepare
from ocsfast.optim.strength import Ramp, lambda_for, paper_lambda
from ocsfast.run.clock import Clock
from ocsfast.run.state import Progress, RunState

Parameters = Mapping[str, nn.Parameter]


class StepHooks:
    """Counts an optimizer's steps, and shrinks in each what will go. It never waits for the device.

    Args:
        config: of the run.
        optimizer: whose steps these are.
        state: of the run; what is counted goes here.
        freezing: which families hold a frozen parameter.
        parameters: the model's parameters by name, as they are now.
        bind: binds the plan to them.

    Attributes:
        coupled: the plan with the weights it walks; None once these hooks are removed.
        captured: whether a step was captured in a CUDA graph.
    """

    def __init__(
        self,
        config: Config,
        optimizer: Optimizer,
        state: RunState,
        freezing: Freezing,
        parameters: Callable[[], Parameters],
        bind: Callable[[Parameters], Coupled],
    ) -> None:
        self.captured = False
        self._config = config
        self._optimizer = optimizer
        self._state = state
        self._freezing = freezing
        self._parameters = parameters
        self._bind = bind
        self._lam: Scalar = 0.0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.coupled: Coupled | None = bind(parameters())
        self._coupling = coupling_of(optimizer, config.settled_penalty(), self.coupled, config.one_pass)
        self._clock = self._new_clock()

    def register(self, and_then: Callable[[], None]) -> None:
        """Begin to listen to the optimizer.

        Args:
            and_then: a method, called after each of its steps where these may make checks: not where a
                CUDA graph may capture them, and with check_every="auto" alone.
        """
        listen = self._optimizer.register_step_post_hook
        self._handles = [
            self._optimizer.register_step_pre_hook(weak_hook(self._before)),
            listen(weak_hook(self._after)),
        ]
        if self._clock is None and self._config.check_every == "auto":
            follow = weak_hook(and_then)
            self._handles.append(listen(lambda optimizer, args, kwargs: follow()))
        self._coupling.listen()

    @property
    def registered(self) -> bool:
        return bool(self._handles)

    def remove(self) -> None:
        """Listen no longer."""
        self.settle()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._coupling.leave()
        self.coupled = self._clock = None

    def settle(self) -> Progress:
        """Where the run stands, with the steps that a device has counted; to read them waits for it."""
        if self._clock is not None:
            self._clock.settle(self._state.progress)
        return self._state.progress

    def update_clock(self) -> None:
        """Let captured steps go by what has been decided."""
        if self._clock is not None:
            self._clock.load(self._state.progress, self._state.mask)

    def current(self) -> Coupled:
        """The plan, after making sure that it still describes the model.

        Raises:
            StateError: a parameter was replaced, or left the optimizer.
        """
        assert self.coupled is not None  # there are hooks
        check_identity(self.coupled, self._parameters(), self._optimizer)
        if not self.coupled.is_current():
            self._rebind()
        return self.coupled

    def rate(self) -> Scalar:
        """The learning rate now, averaged over the coupled weights' elements."""
        assert self.coupled is not None  # there are hooks
        return mean_rate(self._parts(self.coupled), self._optimizer)

    def lam(self, rate: Scalar) -> Scalar:
        """Eq. 7, or the automatic ramp, for a step at this learning rate; 0 before sparsity learning."""
        now, config = self._state.progress, self._config
        if now.t_sl is None or now.start is None or config.penalty == "none":
            return 0.0
        if config.strength == "paper":
            return paper_lambda(config, now.check - now.t_sl)
        ramp = Ramp(config.nats, now.planned, config.shape)
        return lambda_for(rate, ramp.at(now.steps - now.start))

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._coupling.begin()
        if self.coupled is None or stands_still(optimizer):
            return None
        if capture.is_capturing(self.coupled.device):
            self._require_capturable()
        if self._shrinking() is None:
            return None
        if self._freezing.look():
            self._leave_frozen()
        if not self.coupled.is_current():
            self._rebind()
        mask = self._shrinking()
        assert mask is not None  # `_rebind` may have moved it to the weights' new device
        parts = self._parts(self.coupled)
        rate = mean_rate(parts, optimizer)
        scale: Scalar | None = self._state.progress.scale
        if self._clock is None:
            self._lam = self.lam(rate)
        else:
            self._lam = self._clock.lam(rate)
            scale = self._clock.scale if self._config.strength == "auto" else scale
        prepare(parts, optimizer, self._lam, scale, self._config.settled_penalty())
        with_gradients = self._coupling.before(parts, mask)
        return None if with_gradients is None else _after_closure(args, kwargs, with_gradients)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if stands_still(optimizer):
            return
        now, mask = self._state.progress, self._shrinking()
        if self._clock is None:
            now.steps += 1
        if self.coupled is None or mask is None:
            return
        parts = self._parts(self.coupled)
        rate, skipped = mean_rate(parts, optimizer), overflowed(optimizer)
        if self._clock is not None:
            self._clock.count(self._lam, rate, skipped)
        elif skipped is None:
            now.nats = now.nats + self._lam * rate
        else:
            now.nats = now.nats + self._lam * rate * (skipped == 0).double()
        self._coupling.after(self.coupled, parts, mask)

    def _parts(self, coupled: Coupled) -> tuple[Part, ...]:
        return parts_now(coupled, self._optimizer, self._coupling.apart)

    def _shrinking(self) -> Tensor | None:
        """The groups that an optimizer step shrinks; None where it has nothing to do."""
        if self._clock is not None:
            return self._clock.mask  # empty until sparsity learning begins
        return self._state.mask if self._state.progress.stage == "sparsify" else None

    def _leave_frozen(self) -> None:
        """Leave alone what is frozen from now on; the next check chooses without it."""
        if self._state.mask is not None:
            self._state.mask = self._freezing.without_held(self._state.mask)
            if self._clock is not None:  # in place: its counts go on
                self._clock.mask.copy_(self._state.mask)

    def _require_capturable(self) -> None:
        if self._clock is None:
            raise StateError(
                "a CUDA graph is being captured, whose replays would not be counted and would repeat "
                "this step's lambda: attach with capturable=True before the capture"
            )
        self.captured = True
        # Now, and not when these hooks go: they may do so with their pruner, and say nothing.
        capture.keep(self._clock.tensors())

    def _rebind(self) -> None:
        """Weights were moved or converted: build the plan for where and what they are now."""
        assert self.coupled is not None  # there are hooks
        if capture.is_capturing(self.coupled.bound.weights[0].device):
            raise StateError(
                "the weights were moved or converted since the last step: take a step before a CUDA "
                "graph is captured"
            )
        self.coupled = self._bind(self._parameters())
        self._state.to(self.coupled.device)
        if self._clock is not None and self._clock.mask.device != self.coupled.device:
            self.settle()
            self._clock = self._new_clock()
            self.update_clock()

    def _new_clock(self) -> Clock | None:
        if not self._config.capturable or self.coupled is None:
            return None
        return Clock(self._config, self.coupled.bound.plan.count("groups"), self.coupled.device)


def weak_hook(method: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does not keep the owner of its method alive."""
    reference = weakref.WeakMethod(method)

    def hook(*args: Any) -> Any:
        alive = reference()
        return None if alive is None else alive(*args)

    return hook


def _after_closure(args: Any, kwargs: Any, more: Callable[[], None]) -> Any:
    """Call `more` once gradients are there: now, or after the closure that an optimizer's step gets.

    Args:
        args: (optimizer, *positional arguments of `Optimizer.step`).
        kwargs: its keyword arguments.

    Returns:
        What an optimizer's pre-hook returns: None, or other arguments for the step.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        more()
        return None

    def followed() -> Any:
        loss = closure()
        more()
        return loss

    rest = {key: value for key, value in kwargs.items() if key != "closure"}
    return (args[0], followed, *args[2:]), rest
