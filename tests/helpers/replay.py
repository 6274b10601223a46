"""A graph of a training step without a GPU: its calls are recorded, and replayed on the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ocsfast.ops import bound, capture
from ocsfast.optim import adamw, one_pass, torchs_step

# Numbers that reach the host would be those of the capture at every replay.
_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default}


class Graph(TorchDispatchMode):
    """As a CUDA graph: numbers of Python are kept as they were, tensors are read anew.

    Recording runs the step, as a capture does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            raise RuntimeError(f"{func} waits for the device while a graph is captured")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graph]:
    """Record what runs inside, and let ocsfast know."""
    graph = Graph()
    with monkeypatch.context() as patch:
        for module in (capture, bound, adamw, one_pass, torchs_step):
            patch.setattr(module, "is_capturing", lambda device: True)
        with graph:
            yield graph
