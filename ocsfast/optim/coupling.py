"""How the penalty reaches an optimizer's weights: around its step, or in one pass with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.optim import Optimizer

from ocsfast.ops.bound import Bound
from ocsfast.ops.functions import Penalty
from ocsfast.optim.coupled import Coupled, Part, steps_in_one_pass
from ocsfast.optim.one_pass import ParamGroup
from ocsfast.optim.penalty import add_lasso, shrink
from ocsfast.optim.torchs_step import is_torchs, step_by_kernel


class Coupling(Protocol):
    """How the penalty reaches the weights; `coupling_of` picks one for an optimizer."""

    @property
    def apart(self) -> bool:
        """Whether the coming step takes each param group by itself, even if all have one rate."""

    def listen(self) -> None:
        """Steps are to come."""

    def leave(self) -> None:
        """No step is to come: leave the optimizer as it was."""

    def begin(self) -> None:
        """A step begins, which may have no penalty."""

    def before(self, parts: Sequence[Part], mask: Tensor) -> Callable[[], None] | None:
        """Prepare a step. Returns what to call once the gradients are there, if anything.

        Args:
            mask: [groups] bool, the groups that shrink.
        """

    def after(self, coupled: Coupled, parts: Sequence[Part], mask: Tensor) -> None:
        """Shrink what the step has left."""


class OwnPass:
    """An optimizer of `ocsfast.optim` does both in its own pass."""

    apart = True

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = cast(Any, optimizer)

    def listen(self) -> None:
        """Nothing is to be prepared."""

    def leave(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what a step was asked that never came about, as its closure failed."""
        self._optimizer.penalize({})

    def before(self, parts: Sequence[Part], mask: Tensor) -> None:
        self._optimizer.penalize(
            {
                part.param_group: (part.bound, Penalty(mask, part.lam, part.factor))
                for part in parts
                if isinstance(part.bound, Bound)  # its kernel walks no other
            }
        )

    def after(self, coupled: Coupled, parts: Sequence[Part], mask: Tensor) -> None:
        """Nothing is left to do."""


class AroundStep:
    """Eq. 8 is added to the gradients before any other optimizer's step, Eq. 9 follows after it."""

    apart = False

    def __init__(self, optimizer: Optimizer, penalty: str) -> None:
        self._optimizer = optimizer
        self._lasso = penalty in ("both", "lasso")
        self._shrink = penalty in ("both", "shrink")

    def listen(self) -> None:
        """Nothing is to be prepared."""

    def leave(self) -> None:
        """Nothing was."""

    def begin(self) -> None:
        """Nothing is kept from step to step."""

    def before(self, parts: Sequence[Part], mask: Tensor) -> Callable[[], None] | None:
        return (lambda: add_lasso(parts, self._optimizer, mask)) if self._lasso else None

    def after(self, coupled: Coupled, parts: Sequence[Part], mask: Tensor) -> None:
        coupled.forget()
        if self._shrink:
            shrink(parts, self._optimizer, mask)


class WithinStep:
    """A kernel does both in the step of torch's own SGD, Adam or AdamW, on the optimizer's own state.

    The step of these begins for each param group with a call of `_init_group`, which lists what is to
    be stepped: after the closure, and after all hooks have seen the gradients. From `listen` to `leave`
    that call goes through this object. While groups shrink it lets a kernel step and shrink the coupled
    weights, and torch lists, and steps, the rest. Where the kernel cannot do what torch does, a param
    group takes its step by torch, with the penalty around it.
    """

    def __init__(self, optimizer: Optimizer, penalty: str) -> None:
        self._optimizer = optimizer
        self._around = AroundStep(optimizer, penalty)
        self._installed: Callable[..., Any] | None = None
        self._came = False  # whether the last step called `_init_group`: one of somebody else's may not
        self.apart = False
        self._mask: Tensor | None = None
        self._waiting: dict[int, Part] = {}  # by the number of the param group
        self._by_torch: list[Part] = []

    def listen(self) -> None:
        if self._installed is None and "_init_group" not in vars(self._optimizer):
            self._installed = _listing(weakref.ref(self), weakref.ref(self._optimizer))
            cast(Any, self._optimizer)._init_group = self._installed
            self._came = True  # taken for granted: a resumed run has to go on with the same bits

    def leave(self) -> None:
        self.begin()
        if self._installed is not None and vars(self._optimizer).get("_init_group") is self._installed:
            del cast(Any, self._optimizer)._init_group
        self._installed, self.apart = None, False

    def begin(self) -> None:
        # A step calls `_init_group` if the last one did, and if nothing of it is compiled.
        self.apart, self._came = self._came and not _may_be_compiled(), False
        self._waiting, self._by_torch, self._mask = {}, [], None

    def before(self, parts: Sequence[Part], mask: Tensor) -> Callable[[], None] | None:
        if not self.apart:
            return self._around.before(parts, mask)
        self._waiting, self._mask = {part.param_group: part for part in parts}, mask
        return None

    def rest(self, param_group: ParamGroup) -> ParamGroup:
        """What of a param group is left to torch's step, once its gradients are there."""
        self._came = not _may_be_compiled()
        if not self._waiting or self._mask is None:
            return param_group
        held = enumerate(self._optimizer.param_groups)
        number = next((k for k, group in held if group is param_group), -1)
        part = self._waiting.pop(number, None)
        if part is None:
            return param_group
        assert isinstance(part.bound, Bound)  # `coupling_of` sees to it
        weights = set(map(id, part.bound.weights))
        others = [p for p in param_group["params"] if id(p) not in weights]
        penalty = Penalty(self._mask, part.lam, part.factor)
        whole = len(others) + len(weights) == len(param_group["params"])  # none has left it since
        if whole and step_by_kernel(self._optimizer, part.bound, param_group, penalty):
            return {**param_group, "params": others}
        self._by_torch.append(part)
        around = self._around.before([part], self._mask)
        if around is not None:
            around()
        return param_group

    def after(self, coupled: Coupled, parts: Sequence[Part], mask: Tensor) -> None:
        if not self.apart:
            self._around.after(coupled, parts, mask)
            return
        left = [*self._by_torch, *self._waiting.values()]
        if left:
            self._around.after(coupled, left, mask)
        self._waiting, self._by_torch, self._mask = {}, [], None


def _may_be_compiled() -> bool:
    """Whether torch.compile may run or trace what comes: a compiled step calls no `_init_group`."""
    # The callback is None outside of it, and False where it runs what it has and compiles no more.
    return torch.compiler.is_compiling() or get_eval_frame_callback() is not None


def _listing(within: weakref.ref[WithinStep], owner: weakref.ref[Optimizer]) -> Callable[..., Any]:
    """`_init_group` of an optimizer, by way of a coupling as long as that is alive."""

    def init_group(param_group: ParamGroup, *lists: Any, **named: Any) -> Any:
        alive, optimizer = within(), cast(Any, owner())
        rest = param_group if alive is None else alive.rest(param_group)
        return type(optimizer)._init_group(optimizer, rest, *lists, **named)

    return init_group


def coupling_of(optimizer: Optimizer, penalty: str, coupled: Coupled, one_pass: bool) -> Coupling:
    """How the penalty reaches an optimizer's weights.

    Args:
        penalty: `Config.settled_penalty`.
        one_pass: `Config.one_pass`.
    """
    if penalty == "none":
        return AroundStep(optimizer, penalty)
    if steps_in_one_pass(optimizer):
        return OwnPass(optimizer)
    held = all(isinstance(part.bound, Bound) for part in coupled.parts)  # whole, by this process
    if one_pass and held and is_torchs(optimizer):
        return WithinStep(optimizer, penalty)
    return AroundStep(optimizer, penalty)
