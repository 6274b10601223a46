"""The user's `forward=`: a function that is traced in the place of the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn


@contextmanager
def forward_as(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let the model, and copies of it, run `forward(model, ...)` instead of their own forward pass.

    While `forward` itself runs, `model(...)` is the model's own pass again.
    """
    own = vars(model).get("forward")
    bound = isinstance(own, MethodType) and own.__self__ is model

    def instead(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # torch.export wants a function
        outer = vars(self).pop("forward")
        if own is not None:
            vars(self)["forward"] = MethodType(own.__func__, self) if bound else own
        try:
            return forward(self, *args, **kwargs)
        finally:
            vars(self)["forward"] = outer

    vars(model)["forward"] = MethodType(instead, model)  # copying the model binds it to the copy
    try:
        yield
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own
