"""The arithmetic of the proof: float64 whatever the model asks for, no random numbers, no 0 / 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ocsfast.grouping.proof.draws import settled
from ocsfast.grouping.trace.packed import FullLength

DTYPE: Any = Tensor.dtype.__get__  # type: ignore[attr-defined]
GROUPED_MM = ("grouped_mm", "_grouped_mm")
RELU = ("relu", "relu_")
# Fake quantization, and the names of its arguments as far as they say which scale is of which channel.
_BY_CHANNEL = ("input", "scale", "zero_point", "axis")
QUANTIZED: dict[str, tuple[str, ...]] = {
    "fake_quantize_per_tensor_affine": ("input",),
    "_fake_quantize_learnable_per_tensor_affine": ("input",),
    "fake_quantize_per_channel_affine": _BY_CHANNEL,
    "_fake_quantize_learnable_per_channel_affine": _BY_CHANNEL,
}
# Operators with arguments at which they have no value, such as a quotient by zero. Slices that are zero
# lead there in the whole model, and negative numbers behind `bent` lead there in both.
SINGULAR = frozenset(
    {"div", "true_divide", "floor_divide", "remainder", "fmod", "reciprocal", "rsqrt", "sqrt", "pow"}
    | {"float_power", "log", "log2", "log10", "log1p", "logit", "special_logit", "xlogy"}
    | {"special_xlog1py", "addcdiv", "acos", "asin", "acosh", "atanh", "erfinv", "lgamma", "digamma"}
    | {"polygamma"}
)


class Double(FullLength):
    """While it is entered, casts to narrower types give float64, so that rounding stays at 1e-16.

    So do tensors of narrower types that the code makes in a way of its own, `torch.FloatTensor([1])`.
    What code asks for its dtype says that of the trace, so that it takes the same branch and the same
    `torch.finfo`. Packed sequences get their full length, and ReLU is replaced by `bent`; so are
    `grouped_mm` and fake quantization, which torch has for float32 only.

    Args:
        traced: the floating-point dtype of the model in the trace.
    """

    def __init__(self, traced: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._traced = traced

    def __enter__(self) -> Any:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self._default)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == DTYPE:
            known = func(*args)
            return self._traced if known == torch.float64 else known
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        args, kwargs = doubled((args, kwargs or {}))
        name = getattr(func, "_opname", getattr(func, "__name__", ""))  # an operator's, or a function's
        if not name.endswith("_"):  # such as `add_`, `__setitem__`, `__get__`, which are of one tensor
            args, kwargs = pytree.tree_map_only(Tensor, _widened, (args, kwargs))
        if name in GROUPED_MM:
            return grouped_mm(*args, **(kwargs or {}))
        if name in RELU:
            return bent(args[0], in_place=name == "relu_" or (kwargs or {}).get("inplace", False))
        if name in QUANTIZED:
            return scaled(**dict(zip(QUANTIZED[name], args, strict=False)), **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


class Settled(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, a cut model and the whole one compute with the same numbers.

    Random numbers are those of `draws.py`. Where an operator has no finite value for finite operands, as
    0 / 0, it gives zero: what it divides by zero are slices that are gone in the cut model.

    Args:
        samples: how many the inputs hold.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._samples = samples

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = settled(func, args, kwargs, self._samples)
        if out is not NotImplemented:
            return out
        if func._opname.removesuffix("_") in SINGULAR:
            return _tame(func, args, kwargs)
        return func(*args, **kwargs)


def _tame(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator's result, with zero where it is not finite though every operand is."""
    operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    usable = [a.isfinite() for a in operands]  # before the operator writes to one
    out = operator(*args, **kwargs)
    if not isinstance(out, Tensor) or bool(out.isfinite().all()):
        return out
    undefined = ~out.isfinite()
    for finite in usable:
        undefined = undefined & finite
    return out.masked_fill_(undefined, 0)


def _widened(x: Tensor) -> Tensor:
    """A floating-point tensor in float64."""
    return x.double() if x.is_floating_point() and x.dtype != torch.float64 else x


def doubled(arguments: Any) -> Any:
    """The same arguments, with float64 in the place of every floating-point dtype."""
    return pytree.tree_map_only(
        torch.dtype, lambda d: torch.float64 if d.is_floating_point else d, arguments
    )


def bent(x: Tensor, *, in_place: bool) -> Tensor:
    """max(x, -x / 10), instead of ReLU, which can be zero on every input and so hide a wrong label."""
    out = torch.maximum(x, -0.1 * x)
    return x.copy_(out) if in_place else out


def scaled(input: Tensor, scale: Tensor | None = None, axis: int | None = None, **_: Any) -> Tensor:
    """Instead of fake quantization: x (1 + scale) where each channel has a scale, or else x.

    Rounding would hide what is small.
    """
    if scale is None or axis is None:
        return input.clone()
    return input * (
        1 + scale.view([-1 if dim == axis % input.dim() else 1 for dim in range(input.dim())])
    )


def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, **_: Any
) -> Tensor:
    """a [n, k] times b [runs, k, m]: the rows of a in runs that end at `offs`, a matrix each; [n, m].

    Raises:
        NotImplementedError: other shapes, or a bias.
    """
    if a.dim() != 2 or b.dim() != 3 or offs is None or bias is not None:
        raise NotImplementedError("grouped_mm in float64 is known for rows in runs only")
    ends = offs.tolist()
    runs = [a[start:end] @ b[k] for k, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    rest = a.new_zeros(a.shape[0] - (ends[-1] if ends else 0), b.shape[2])
    return torch.cat([*runs, rest])
