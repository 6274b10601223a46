"""Scratch memory that other streams and captured graphs may still use: what CUDA is asked then."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator

import pytest
import torch
from helpers.builders import draw_mask, mixed_case, scalar

from ocsfast.ops import _C, extension
from ocsfast.ops import functions as ops

pytestmark = pytest.mark.skipif(
    extension.build_info()["cuda_version"] != "emulated",
    reason="needs the emulated build: make emulated",
)


class Runtime:
    """The emulated CUDA runtime."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(_C.__file__)

    def use(self, stream: int, capturing: bool = False) -> None:
        self._library.emulated_use_stream(ctypes.c_int64(stream), ctypes.c_bool(capturing))

    def counts(self) -> tuple[int, int, int]:
        """Events that exist, and how often one was recorded and waited for."""
        counts = (ctypes.c_int64 * 3)()
        self._library.emulated_streams(counts)
        return counts[0], counts[1], counts[2]


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    gc.collect()
    runtime = Runtime()
    runtime.use(0)
    yield runtime
    runtime.use(0)


def bound_and_call() -> tuple[ops.Bound, torch.Tensor, torch.Tensor]:
    made = mixed_case()
    return made.bound(), draw_mask(made.plan, 0.5), scalar(0.5, "cpu")


def test_its_own_stream_costs_nothing(runtime: Runtime) -> None:
    before = runtime.counts()
    bound, mask, factor = bound_and_call()
    ops.shrink_(bound, mask, factor)
    del bound
    gc.collect()
    assert runtime.counts() == before


def test_release_waits_for_other_streams(runtime: Runtime) -> None:
    events, records, waits = runtime.counts()
    bound, mask, factor = bound_and_call()
    for stream in (1, 2, 1):
        runtime.use(stream)
        ops.shrink_(bound, mask, factor)
    assert runtime.counts() == (events + 2, records + 3, waits)
    del bound
    gc.collect()
    assert runtime.counts() == (events, records + 3, waits + 2)


def test_what_a_graph_was_captured_with_is_kept(runtime: Runtime) -> None:
    """Freed memory would be handed out again: the next bound plan would get the same."""
    bound, mask, factor = bound_and_call()
    ops.shrink_(bound, mask, factor)
    before = runtime.counts()
    runtime.use(0, capturing=True)
    ops.shrink_(bound, mask, factor)
    with pytest.raises(RuntimeError, match="cannot be bound while a CUDA graph is captured"):
        bound_and_call()
    runtime.use(0)
    del bound
    gc.collect()
    assert runtime.counts() == before
