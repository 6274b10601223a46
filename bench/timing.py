"""Times of calls, taken in turn: a machine's speed drifts, and what is compared has to drift together.

On the CPU a call is timed by the wall clock. On CUDA a batch of calls is timed by events, and queued
while the device sleeps: the launches then lie ready when the first event is recorded, and the gaps that
the host would leave between them are not counted. What the host takes is reported by itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]

BATCH_SECONDS = 2e-3  # of the device, by batch; a longer call is a batch of its own
MOST_CALLS = 20  # a batch; far below the 1024 launches that a stream takes without waiting
LONGEST_SLEEP = 20e-3
CYCLES_A_SECOND = 2e9  # of the counter that the sleep reads; where it is slower, the sleep is longer


def warm_up(step: Call) -> None:
    """Three calls on a side stream, as torch asks for ahead of a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)


@dataclass(frozen=True)
class Times:
    """Seconds of one call, a number a round."""

    seconds: list[float]
    host: list[float]  # until the call has returned
    batch: int = 1
    queued: bool = False  # whether all calls of a batch waited on the device before the first began

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def stats(self) -> dict[str, float]:
        """What a row says of it."""
        return {
            "min": min(self.seconds),
            "median": self.median,
            "max": max(self.seconds),
            "rounds": len(self.seconds),
        }


def in_turn(
    calls: Mapping[str, Call], device: str, rounds: int, *, warm: bool = True, waits: bool = False
) -> dict[str, Times]:
    """Time each call once a round, in the order given.

    Args:
        warm: call each before it is timed. On CUDA that is always done: kernels are loaded then.
        waits: the calls wait for the device; they are timed one by one, from end to end.
    """
    batches = {name: _prepare(call, device, warm, waits) for name, call in calls.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(_round(call, device, *batches[name]))
    return {
        name: Times([t for t, _ in pairs], [h for _, h in pairs], batches[name][0], batches[name][1] > 0)
        for name, pairs in taken.items()
    }


def _prepare(call: Call, device: str, warm: bool, waits: bool) -> tuple[int, float]:
    """Calls a batch, and the seconds that the device sleeps before it."""
    if device != "cuda":
        if warm:
            call()
        return 1, 0.0
    call()
    seconds, host = min(_round(call, device, 1, 0.0) for _ in range(2))
    if waits:
        return 1, 0.0
    batch = max(1, min(MOST_CALLS, int(BATCH_SECONDS / max(seconds, 1e-6))))
    sleep = 1.5 * host * batch + 50e-6
    return batch, sleep if sleep < LONGEST_SLEEP else 0.0


def _round(call: Call, device: str, batch: int, sleep: float) -> tuple[float, float]:
    """Seconds a call, of the device and of the host."""
    if device != "cuda":
        begun = time.perf_counter()
        call()
        seconds = time.perf_counter() - begun
        return seconds, seconds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if sleep:
        torch.cuda._sleep(int(sleep * CYCLES_A_SECOND))
    start.record()
    begun = time.perf_counter()
    for _ in range(batch):
        call()
    host = time.perf_counter() - begun
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / batch, host / batch
