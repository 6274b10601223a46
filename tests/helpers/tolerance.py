"""Tolerances relative to torch's own error, and what one op may be asked on every device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def assert_as_good_as_torch(ours: Tensor, torchs: Tensor, exact: Tensor, atol: float = 0.0) -> None:
    """Our error against float64 is at most twice the error of plain torch in the same dtype, plus atol.

    Where torch happens to be exact, a unit in the last place of the largest value is granted; a few in
    float64, where `exact` itself is rounded.
    """
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    rounding = torch.finfo(ours.dtype).eps * scale * (8 if ours.dtype == torch.float64 else 1)
    error = float((ours.double() - exact).abs().max()) if exact.numel() else 0.0
    error_of_torch = float((torchs.double() - exact).abs().max()) if exact.numel() else 0.0
    assert error <= 2 * error_of_torch + rounding + atol, (error, error_of_torch, rounding)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_bits(run: Callable[[], list[Tensor]]) -> None:
    """The same result to the bit, again and again, on one thread and on two."""
    first = run()
    for number in (1, 2, 1, 2):
        with threads(number):
            again = run()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
