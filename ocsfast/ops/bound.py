"""A plan bound to the weights that it describes: what most ops take first."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from ocsfast.ops.capture import is_capturing
from ocsfast.ops.extension import op, release, require_extension
from ocsfast.ops.plan import Plan

# Called once a weight at every step of an optimizer: `map` takes half the time of a comprehension.
_VERSION = operator.attrgetter("_version")
_POINTER = torch.Tensor.data_ptr
_STRIDE = torch.Tensor.stride


class Weights(Protocol):
    """A plan's weights, wherever they lie.

    `Bound` where one process holds them whole, `ShardedWeights` where several hold their rows. The ops
    `group_saliency`, `slice_sums`, `lasso_grad_` and `shrink_` take either.
    """

    @property
    def plan(self) -> Plan: ...

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """`plan.names` in order: the model's own parameters."""

    def pointers(self) -> tuple[int, ...]:
        """Where the weights lie in memory."""

    def forget(self) -> None:
        """Forget the sums of squares that the last op left behind: the next op takes them anew."""

    def not_finite(self) -> str | None:
        """The name of the first weight that holds NaN or infinite values."""


class Bound:
    """A plan bound to the weights it walks: checked once, with what kernels remember between calls.

    A call then costs microseconds on the host however many weights there are. The weights are held. They
    may change in value, but not in place, shape, strides, dtype or device: an op that finds them changed
    raises.

    Ops leave the slices' sums of squares behind, and the next op uses them if the weights are still as
    the last one left them. It tells by the tensors' versions. Writing through `.data` does not raise a
    tensor's version: call `forget()` after it.

    On CUDA all ops of one `Bound` belong on one stream at a time, because they share scratch memory.
    That memory is freed only once all streams are past it, and never if a CUDA graph was captured with
    it. Once an op was captured, sums of squares are taken anew in each call.

    Args:
        plan: the tables, on the device of the weights.
        weights: `plan.names` in order, of the shapes and strides the plan was built for; float32,
            bfloat16, float16 and float64 may be mixed.

    Attributes:
        strides: of the weights, as they were bound.
        fitting: by a name, tensors of an optimizer's state that were found to be as its kernel takes
            them: the same ones need not be looked at again.

    Raises:
        RuntimeError: a weight is not what the plan was built for, or the plan contradicts itself.
        ImportError: the extension is missing.
    """

    def __init__(self, plan: Plan, weights: Sequence[Tensor]) -> None:
        require_extension()
        self.plan = plan
        self.weights = tuple(weights)
        with torch.no_grad():  # else the op gets aliases, and does not see a weight change its memory
            self.ticket = op("bind")(self.weights, plan.tables, plan.shapes, plan.layout)
        weakref.finalize(self, release, int(self.ticket))
        self._known: tuple[int, Tensor | None, int] | None = None
        self._captured = False  # replays of a CUDA graph change weights without raising their versions
        self.strides = [weight.stride() for weight in self.weights]
        self.fitting: dict[str, Sequence[Tensor | None]] = {}
        self._none = plan.tables.new_empty(0)

    def pointers(self) -> tuple[int, ...]:
        return tuple(map(_POINTER, self.weights))

    def not_finite(self) -> str | None:
        flags = zip(self.plan.names, self.weights, strict=True)
        return next((name for name, weight in flags if not bool(weight.isfinite().all())), None)

    def forget(self) -> None:
        self._known = None

    def knows(self, mask: Tensor | None = None) -> bool:
        """Whether the sums of squares are at hand: of all slices, or of those of `mask`'s groups."""
        if self._captured or self._known is None or self._known[0] != self._version():
            return False
        if is_capturing(self.plan.tables.device):
            return False  # what is known now may not be so at a replay
        _, known_mask, version = self._known
        return known_mask is None or (known_mask is mask and known_mask._version == version)

    def learn(self, mask: Tensor | None = None) -> None:
        """The kernels hold the sums of squares of the weights as they are: all, or `mask`'s groups'."""
        self._captured = self._captured or is_capturing(self.plan.tables.device)
        self._known = (self._version(), mask, 0 if mask is None else mask._version)

    def changed(self) -> None:
        """An op has changed every weight: raise the versions, as any in-place op of torch does."""
        torch.autograd.graph.increment_version(self.weights)

    def _version(self) -> int:
        return sum(map(_VERSION, self.weights))

    def fits(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether each tensor has the strides of its weight; None fits."""
        self._require_one_each(tensors)
        try:
            return list(map(_STRIDE, cast(Sequence[Tensor], tensors))) == self.strides
        except TypeError:  # one is None
            pairs = zip(tensors, self.strides, strict=True)
            return all(t is None or t.stride() == stride for t, stride in pairs)

    def aligned(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Tensors with the strides of their weights, copied where need be, and an empty one for None."""
        if self.fits(tensors):
            return self.states(tensors)
        return [
            self._none if t is None else t if t.stride() == stride else _with_stride(t, stride)
            for t, stride in zip(tensors, self.strides, strict=True)
        ]

    def states(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """The same without copies, for tensors that an op writes to."""
        self._require_one_each(tensors)
        return [self._none if t is None else t for t in tensors]

    def _require_one_each(self, tensors: Sequence[Tensor | None]) -> None:
        if len(tensors) != len(self.weights):
            raise ValueError(f"{len(tensors)} tensors for {len(self.weights)} weights")


def _with_stride(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    if tensor.dim() != len(stride):
        return tensor  # the op says what is wrong
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(
        tensor
    )
