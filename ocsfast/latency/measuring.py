"""The measurement: every operator at several widths, in turns with the whole model.

A machine's speed drifts. So all points are visited in passes, each in another order, and the whole model
is timed between the passes; a point's time is the median of its visits.
"""

from __future__ import annotations

import logging
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch

from ocsfast.core.errors import StateError
from ocsfast.core.families import Families
from ocsfast.core.latency import Entry, Extent
from ocsfast.latency.calls import Call, Memory, make_call
from ocsfast.latency.clock import Clock
from ocsfast.latency.graph import Site
from ocsfast.latency.grid import kept_counts, rising
from ocsfast.latency.progress import Progress
from ocsfast.latency.sides import Profiles, Side, sides_of

logger = logging.getLogger("ocsfast")

PASSES = 3
VISITS = 4  # calls of a point in a pass; the first meets cold caches, as in a model
MODEL_VISITS = 5  # of the whole model, before each pass and after the last
LEAST_GRID = 2
MOST_SPREAD = 0.25
SHRINKS = 0.5  # of the time that the operators alone do not take

Point = tuple[int, ...]


@dataclass(eq=False)
class Job:
    """An operator to time; equal ones share a job.

    Attributes:
        site: one of its calls.
        sides: along which it is timed.
        nodes: all its calls.
        kept: the counts of each side.
        seconds: of each point that was visited.
        linear: whether it cannot be called at other widths than all: it then counts as its size.
    """

    site: Site
    sides: tuple[Side, ...]
    nodes: list[str]
    kept: list[tuple[int, ...]] = field(default_factory=list)
    seconds: dict[Point, list[float]] = field(default_factory=dict)
    linear: bool = False

    @property
    def whole(self) -> Point:
        return tuple(side.size for side in self.sides)

    def share(self, point: Point) -> float:
        """What a point may take of the whole, by its sizes."""
        share = 1.0
        for count, side in zip(point, self.sides, strict=True):
            share *= count / side.size
        return share

    def points(self) -> list[Point]:
        return [self.whole] if self.linear else list(product(*self.kept))


@dataclass(frozen=True)
class Measured:
    """What was measured, in seconds; `entries` in whole nanoseconds, as they came."""

    dense: float
    spread: float
    entries: tuple[Entry, ...]


def jobs_of(sites: Sequence[Site], families: Families) -> list[Job]:
    """The operators to time: those that compute or move something, each once."""
    profiles, jobs = Profiles(families), dict[object, Job]()
    for site in sites:
        if site.free:
            continue
        sides = sides_of(site.operation, profiles)
        spans = tuple((side.unit, side.fixed, tuple(side.spans.items())) for side in sides)
        given = (site.node.args, dict(site.node.kwargs))
        arguments = repr(torch.fx.node.map_arg(given, lambda _: None))
        key = (site.operation.operator, site.tensors, site.results, spans, arguments)
        jobs.setdefault(key, Job(site, sides, [])).nodes.append(site.operation.node)
    return list(jobs.values())


class Measurement:
    """Times a model's operators and the model itself.

    Args:
        jobs: the operators.
        model: the whole model, as a call.
        clock: seconds of a call.
        grid: points along each side, at most.
        units: how many groups each family loses at a time.
        most_gone: the largest share of a family that may go.
        time_limit: seconds that it may take.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        model: Call,
        clock: Clock,
        *,
        grid: int,
        units: Sequence[int],
        most_gone: float,
        time_limit: float,
        progress: Progress,
    ) -> None:
        self.jobs, self.model, self.clock = list(jobs), model, clock
        self.grid, self.time_limit = grid, time_limit
        self.units, self.most_gone = units, most_gone
        self.progress, self.memory = progress, Memory(model.device)
        self._dense: list[float] = []

    def run(self) -> Measured:
        """Measure.

        Raises:
            StateError: nothing can be timed, it takes too long, or the model's times vary too much.
        """
        begun = time.perf_counter()
        with torch.no_grad():
            self._time_model()
            self._time_whole()
            points = self._settle_grid()
            for number in range(PASSES):
                taken = time.perf_counter() - begun
                if number and taken * (number + 1) / number > self.time_limit:
                    logger.info("time_limit= leaves %d passes of %d", number, PASSES)
                    break
                random.Random(number).shuffle(points)
                self._pass(points, number, begun)
                self._time_model()
        dense, spread = self._whole_model()
        return Measured(dense, spread, tuple(_entry(job) for job in self.jobs))

    def _time_model(self) -> None:
        self._timed(self.model)
        self._dense += [self._timed(self.model) for _ in range(MODEL_VISITS)]

    def _time_whole(self) -> None:
        """Each operator as the dense model has it: what can be called at all, and how long it takes."""
        left = []
        for job in self.jobs:
            call = self._call(job, job.whole)
            if call is not None:
                job.seconds[job.whole] = [self._timed(call)]
                left.append(job)
        self.jobs = left
        if not any(job.sides for job in left):
            raise StateError(
                "nothing was measured: no operator of the model that can shrink was traced and can be "
                "called alone"
            )

    def _settle_grid(self) -> list[tuple[Job, Point]]:
        """The finest grid that the time limit has room for, and all its points."""
        for grid in range(self.grid, LEAST_GRID - 1, -1):
            for job in self.jobs:
                job.kept = [self._counts(side, grid) for side in job.sides]
            points = [(job, point) for job in self.jobs for point in job.points()]
            each = sum(job.share(point) * job.seconds[job.whole][0] for job, point in points)
            needed = each * (1 + PASSES * VISITS)
            if needed <= self.time_limit:
                if grid < self.grid:
                    logger.warning(
                        "time_limit=%g leaves a grid of %d x %d points an operator, not %d x %d",
                        *(self.time_limit, grid, grid, self.grid, self.grid),
                    )
                return points
        raise StateError(
            f"{len(self.jobs)} operators at {len(points)} widths take some {needed:.0f} s to measure, "
            f"and time_limit={self.time_limit:g}: raise it, or pass a smaller batch as example_inputs="
        )

    def _counts(self, side: Side, grid: int) -> tuple[int, ...]:
        groups = math.gcd(*(self.units[f] for f in side.families))
        return kept_counts(side, grid, groups, self.most_gone)

    def _pass(self, points: Sequence[tuple[Job, Point]], number: int, begun: float) -> None:
        for n, (job, point) in enumerate(points):
            self.progress.show(number * len(points) + n, PASSES * len(points))
            if number == 0 and time.perf_counter() - begun > 2 * self.time_limit:
                raise StateError(
                    f"measuring takes longer than time_limit={self.time_limit:g} s: {len(points) - n} "
                    f"of {len(points)} points are missing. Raise it, or pass a smaller batch"
                )
            if job.linear and point != job.whole:
                continue
            call = self._call(job, point, warm=number == 0)
            if call is None:
                job.linear = True
                continue
            seconds = [self._timed(call) for _ in range(VISITS)]
            job.seconds.setdefault(point, []).extend(seconds)
        self.progress.end()

    def _call(self, job: Job, point: Point, warm: bool = True) -> Call | None:
        """The operator at a point; None where it cannot be called alone, with a word in the log.

        Args:
            warm: whether to call it once: libraries make their plans then, and it shows that it can be.
        """
        try:
            call = make_call(job.site, job.sides, point, self.memory)
            if warm:
                call()
        except Exception as error:  # whatever an operator raises
            operator, where = job.site.operation.operator, job.site.operation.where or "the model"
            logger.info("%s of %s is not timed at %s: %s", operator, where, point, error)
            return None
        return call

    def _timed(self, call: Call) -> float:
        seconds = self.clock(call)
        number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if not number or not 0 <= seconds < math.inf:
            raise StateError(f"the clock said {seconds!r} of {call.operator}: seconds are expected")
        return float(seconds)

    def _whole_model(self) -> tuple[float, float]:
        """The dense model's median, and how far its quartiles lie apart, as a share of it."""
        low, middle, high = statistics.quantiles(self._dense, n=4)
        spread = (high - low) / middle if middle > 0 else 0.0
        if spread > MOST_SPREAD:
            raise StateError(
                f"the model's own time varies too much to tell a ratio of it: a batch takes "
                f"{1e3 * middle:.3g} ms, and half of {len(self._dense)} lie between {1e3 * low:.3g} and "
                f"{1e3 * high:.3g} ms. Try again with the machine left to it, pass a larger batch, or "
                "target= an ocsfast.LatencyTable that was measured before"
            )
        return middle, spread


def _entry(job: Job) -> Entry:
    """The entry of a job, in nanoseconds as they were measured, but rising."""
    kept = [(max(1, side.size // 4), side.size) for side in job.sides] if job.linear else job.kept
    kept = [*(tuple(sorted(set(counts))) for counts in kept)]
    rows, cols = (*kept, (1,), (1,))[:2]

    def nanoseconds(r: int, c: int) -> float:
        point = (r, c)[: len(job.sides)]
        if job.linear:
            return 1e9 * statistics.median(job.seconds[job.whole]) * job.share(point)
        return 1e9 * statistics.median(job.seconds[point])

    sides = [Extent(s.tensor, s.dim, counts) for s, counts in zip(job.sides, kept, strict=True)]
    return Entry(
        job.site.operation.operator,
        tuple(job.nodes),
        tuple(layout.shape for layout in job.site.tensors),
        sides[0] if sides else None,
        sides[1] if len(sides) > 1 else None,
        rising([[nanoseconds(r, c) for c in cols] for r in rows]),
    )


def settled(measured: Measured) -> tuple[tuple[Entry, ...], int, int]:
    """The entries made to sum to the dense model's time, that time, and the rest that never goes.

    The operators alone sum to less than the model, by a tenth or so: what lies between them is missing,
    and caches are colder there. Of 20 cuts of ResNet18 and 50, MobileNetV2, EfficientNet-B0 and
    ConvNeXt-Tiny (one thread of a CPU) the time is predicted to 7 % (median) where all of that shrinks
    with the operators, to 5 % where none does, and to 2.6 % where half does.
    """
    dense = max(1, round(1e9 * measured.dense))
    total = sum(entry.nanoseconds[-1][-1] * len(entry.nodes) for entry in measured.entries)
    missing = dense - total
    scale = (total + (SHRINKS * missing if missing > 0 else missing)) / max(1, total)
    entries = tuple(
        replace(
            entry,
            nanoseconds=tuple(tuple(int(scale * value) for value in row) for row in entry.nanoseconds),
        )
        for entry in measured.entries
    )
    total = sum(entry.nanoseconds[-1][-1] * len(entry.nodes) for entry in entries)
    return entries, dense, max(0, dense - total)
