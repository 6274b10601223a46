"""Why a model could not be traced, in one line, with the place in the user's code and the way out."""

from __future__ import annotations

import re
import traceback
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ocsfast.core.errors import GroupingError, OcsfastError
from ocsfast.grouping.trace.side_effects import own_inputs, undisturbed

NOT_THE_USERS = r"^<|/torch/|/ocsfast/grouping/"  # files of a traceback that no user wrote


def cause(error: BaseException) -> str:
    """The kind of error, the last line of the user's code that it passed, and its first line."""
    passed = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    where = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    user = [place for place in (*passed, *where) if not re.search(NOT_THE_USERS, place[0])]
    place = f" at {user[-1][0]}:{user[-1][1]}" if user else ""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}{place}: {first[:300]}".rstrip(".")


def way_out(error: BaseException) -> str:
    """What the user can pass so that the trace succeeds."""
    other = "example_inputs= of the form that inference takes"
    if "data-dependent" in str(error) or "DataDependent" in type(error).__name__:
        return f"It branches on its data: pass {other}, or forward= (a function of model and inputs)"
    return f"Pass {other}, or in forward= what to run instead (a function of model and inputs)"


def require_runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse inputs on which the model itself fails, without any tracing.

    Raises:
        GroupingError: the model fails in both modes. The message tells how it failed in evaluation.
    """
    said = []
    for training in (False, True):
        with undisturbed(model, training=training, real=True), torch.no_grad():
            own_args, own_kwargs = own_inputs(args, kwargs)
            try:
                model(*own_args, **own_kwargs)
                return
            except OcsfastError:
                raise
            except Exception as error:
                said.append(cause(error))
    leaves = pytree.tree_leaves((args, kwargs))
    given = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in leaves)
    raise GroupingError(
        f"the model fails on example_inputs= ({given[:200]}): {said[0]}. Pass one batch as the model "
        "takes it"
    )
