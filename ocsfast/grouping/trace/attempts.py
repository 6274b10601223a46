"""Which inputs a model can be traced with, and in which modes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ocsfast.core.errors import GroupingError
from ocsfast.grouping.trace.batch import Batch, batches
from ocsfast.grouping.trace.export import Trace, trace


@dataclass(frozen=True)
class Attempt:
    """The graphs of a model, traced with one batch."""

    batch: Batch
    traces: dict[bool, Trace]  # by mode (True: training), evaluation first
    failed: dict[bool, GroupingError]  # why a mode has none
    why: str = ""  # why the inputs are the user's own, and not BATCH samples of them


def attempt(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], why: str = "") -> Attempt:
    """Trace a model in both modes: with BATCH samples, or with its inputs as given where that does more.

    Args:
        model, args, kwargs: one call of the model.
        why: why the inputs should be traced as given, if that is known.

    Raises:
        GroupingError: neither mode can be traced. It says how the inputs as given failed.
    """
    first, *others = batches(args, kwargs)
    best = _traced(model, others[-1] if why and others else first, why)
    if not why and best.failed and others:
        error = next(iter(best.failed.values()))
        given = _traced(model, others[0], f"with {first.rows} samples {getattr(error, 'why', error)}")
        if len(given.traces) > len(best.traces) or not best.traces:
            best = given
    if not best.traces:
        raise best.failed[False]
    return best


def _traced(model: nn.Module, batch: Batch, why: str) -> Attempt:
    traces: dict[bool, Trace] = {}
    failed: dict[bool, GroupingError] = {}
    for training in (False, True):
        try:
            traces[training] = trace(model, batch.args, batch.kwargs, training=training, samples=None)
        except GroupingError as error:
            failed[training] = error
    return Attempt(batch, traces, failed, why)
