"""How long a call takes, on the device where it runs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from ocsfast.latency.calls import Call

Clock = Callable[[Call], float]  # seconds of one call

QUEUED = 10  # calls between two events: a single one would be the launch alone


def clock_for(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """The clock of a device: events on CUDA, else the wall clock around one call."""
    return functools.partial(_by_events, device) if device.type == "cuda" else _by_wall


def _by_wall(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _by_events(device: torch.device, call: Callable[[], object]) -> float:
    """Of several calls in a row, as a model launches its operators: the host's time if it is longer."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    stream = torch.cuda.current_stream(device)  # an event is recorded on the current device otherwise
    stream.synchronize()
    start.record(stream)
    for _ in range(QUEUED):
        call()
    end.record(stream)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / QUEUED
