"""The arithmetic of the proof: float64 whatever the model's code asks for, and no random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ocsfast.grouping.trace.packed import FullLength

GROUPED_MM = ("grouped_mm", "_grouped_mm")
RELU = ("relu", "relu_")
# What operators that draw random numbers return instead.
_DRAWN: dict[tuple[str, ...], float] = {
    ("bernoulli", "bernoulli_"): 1.0,
    ("rand", "rand_like", "uniform", "uniform_"): 0.5,
    ("randn", "randn_like", "normal", "normal_", "normal_functional"): 0.0,
    ("exponential", "exponential_", "gamma", "geometric", "geometric_", "poisson"): 1.0,
    ("randint", "randint_like", "random", "random_"): 0.0,
}


class Double(FullLength):
    """While it is entered, casts to narrower types give float64, so that rounding stays at 1e-16.

    It also gives packed sequences their full length, and replaces ReLU by `bent`, and `grouped_mm`,
    which torch has for float32 only.
    """

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
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        args, kwargs = doubled((args, kwargs or {}))
        name = getattr(func, "_opname", getattr(func, "__name__", ""))  # an operator's, or a function's
        if name in GROUPED_MM:
            return grouped_mm(*args, **(kwargs or {}))
        if name in RELU:
            return bent(args[0], in_place=name == "relu_" or (kwargs or {}).get("inplace", False))
        return super().__torch_function__(func, types, args, kwargs)


class Settled(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, random numbers are constants, the same for a cut model and the whole one.

    Dropout keeps everything, a uniform number is one half, a normal one is zero.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._opname
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        out = func(*args, **kwargs)
        for drawing, value in _DRAWN.items():
            if name in drawing and isinstance(out, Tensor):
                out.fill_(value)
        if name == "randperm":
            out.copy_(torch.arange(len(out), device=out.device))
        return out


def doubled(arguments: Any) -> Any:
    """The same arguments, with float64 in the place of every floating-point dtype."""
    return pytree.tree_map_only(
        torch.dtype, lambda d: torch.float64 if d.is_floating_point else d, arguments
    )


def bent(x: Tensor, *, in_place: bool) -> Tensor:
    """max(x, -x / 10), instead of ReLU, which can be zero on every input and so hide a wrong label."""
    out = torch.maximum(x, -0.1 * x)
    return x.copy_(out) if in_place else out


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
