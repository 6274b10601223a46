"""Measuring a model's latency, for `Config.target`."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ocsfast.api.arguments import Inputs, Unpacked, families_of, plain, require_whole, unpacked
from ocsfast.api.calls import options_of
from ocsfast.choice.units import multiple_for, units_of
from ocsfast.core.config import LATENCY, Config
from ocsfast.core.errors import ConfigError, GroupingError, OcsfastError, StateError
from ocsfast.core.families import Families
from ocsfast.core.latency import LatencyRecord
from ocsfast.core.memory_format import is_channels_last
from ocsfast.cut.layout import is_sharded
from ocsfast.distributed.processes import Processes
from ocsfast.grouping.trace.forward import forward_as
from ocsfast.grouping.trace.side_effects import own_inputs, undisturbed
from ocsfast.latency.calls import Call
from ocsfast.latency.clock import Clock, clock_for
from ocsfast.latency.graph import sites_of
from ocsfast.latency.measuring import Measured, Measurement, jobs_of, settled
from ocsfast.latency.progress import Progress

logger = logging.getLogger("ocsfast")

GRID = 5
TIME_LIMIT = 120.0


class LatencyTable(LatencyRecord):
    """How long each operator of a model takes at several widths, on one device: a `Config.target`.

    Measure it where the model will run, save it, and train with it anywhere: the ratio is then of the
    time that one batch of the example took there. `docs/latency.md` describes the file, which may also
    be written by hand.

    Attributes:
        device: Where it was measured, by name.
        dtype: Of the model there, as "float32".
        memory_format: "contiguous" or "channels_last".
        threads: Of the CPU, that torch used.
        torch: Its version there.
        example: The shapes of the example inputs, the batch included.
        dense: Nanoseconds of one batch.
        spread: How far the quartiles of that lie apart, as a share of it.
        rest: Nanoseconds that no cut removes.
        entries: The operators. Those of all calls, dense, and the rest sum to `dense`.

    Raises:
        ConfigError: a value that no measurement gives.

    Examples:
        >>> import ocsfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> table = ocsfast.LatencyTable.measure(model, torch.randn(4, 8), clock=lambda call: 1e-3)
        >>> table.dense
        1000000
    """

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        example_inputs: Inputs,
        *,
        grid: int = GRID,
        time_limit: float = TIME_LIMIT,
        progress: bool = True,
        clock: Clock | None = None,
        config: Config | None = None,
        **config_fields: Any,
    ) -> LatencyTable:
        """Time a model's operators, each alone at several widths, and the model itself, in evaluation.

        Args:
            model: a dense module on the device, in the dtype and the memory format that it will run in;
                also compiled, in DataParallel or in DistributedDataParallel: the module inside is timed.
            example_inputs: one batch, of the size that it will run with.
            grid: points along each width of an operator, at least 2.
            time_limit: seconds; if they do not suffice the grid is made coarser, and a warning says so.
            progress: whether to show on a terminal how far it is.
            clock: seconds of one call, where another than this process tells them: a function of the
                call, which has `operator` and `shapes`, and runs when it is called.
            config: options as one object; those count that say what may go, `max_family_ratio` (no less
                is timed than may be kept) and `round_to`.
            **config_fields: fields of `Config`; they override `config`.

        Raises:
            ConfigError: a bad option.
            GroupingError: the model cannot be traced, or nothing in it can be pruned.
            StateError: the model is sharded or its times vary too much, nothing could be timed, or the
                time limit has no room for the coarsest grid.
        """
        model, options = plain(model), options_of(config, config_fields)
        _require_numbers(grid, time_limit)
        require_whole(model)
        inputs = unpacked(example_inputs)
        families = families_of(model, inputs, replace(options, target="flops"))
        return _measured(model, inputs, families, options, grid, time_limit, progress, clock)


def with_latency(
    model: nn.Module,
    inputs: Unpacked | None,
    families: Families,
    options: Config,
    processes: Processes | None = None,
) -> Config:
    """The options with target="latency" measured: once, on rank 0, where several processes train.

    Args:
        inputs: one batch; None where there is none.
        processes: that train the model; None: this one alone.

    Raises:
        ConfigError, GroupingError, StateError: as `LatencyTable.measure`, on every process.
    """
    if isinstance(options.target, LatencyRecord):
        if processes is None or processes.is_first:
            logger.info("the ratio is of the latency on %s", options.target.says())
        return options
    if options.target != LATENCY or not families.families:
        return options
    if inputs is None or is_sharded(model):
        raise StateError(
            "target='latency' is measured on the whole model: before it is sharded, "
            "table = ocsfast.LatencyTable.measure(model, example_inputs), and then target=table"
        )

    def measure() -> LatencyTable:
        return _measured(model, inputs, families, options, GRID, TIME_LIMIT, True, None)

    table = measure() if processes is None else _made_by_first(processes, measure)
    return replace(options, target=table)


def _made_by_first(processes: Processes, make: Callable[[], LatencyTable]) -> LatencyTable:
    """What rank 0 makes, on every rank; so is its error."""
    made: LatencyTable | None = None
    error: OcsfastError | None = None
    if processes.is_first or processes.process_group is None:
        try:
            made = make()
        except OcsfastError as raised:
            error = raised
        except Exception as raised:  # the other ranks wait
            error = StateError(f"measuring the latency failed: {raised!r}")
            error.__cause__ = raised
    made, error = processes.first_of_all((made, error))
    if error is not None:
        raise error
    assert made is not None  # or there is an error
    return made


def _measured(
    model: nn.Module,
    inputs: Unpacked,
    families: Families,
    options: Config,
    grid: int,
    time_limit: float,
    progress: bool,
    clock: Clock | None,
) -> LatencyTable:
    if not families.families:
        raise GroupingError("nothing in this model can be pruned, so there is no latency to measure")
    if not families.operations:
        raise GroupingError(
            "the model was not traced by labels (grouping='torch-pruning'), so that its operators are "
            "not known: target='latency' needs grouping='labels'"
        )
    device, begun = next(model.parameters()).device, time.perf_counter()
    parameters, multiple = dict(model.named_parameters()), multiple_for(options.round_to, device)
    with nullcontext() if options.forward is None else forward_as(model, options.forward):
        jobs = jobs_of(sites_of(model, *inputs, families), families)
        text = "measuring the latency of %d different operators, %g s at most"
        logger.info(text, len(jobs), time_limit)
        with undisturbed(model, training=False, real=True), torch.no_grad():
            args, kwargs = own_inputs(*inputs)
            tensors = (x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            shapes = tuple(tuple(x.shape) for x in tensors)
            whole = Call("model", shapes, device, lambda: model(*args, **kwargs))
            measured = Measurement(
                jobs,
                whole,
                clock or clock_for(device),
                grid=grid,
                units=units_of(families, parameters, options.round_to, multiple),
                most_gone=options.max_family_ratio,
                time_limit=time_limit,
                progress=Progress(progress),
            ).run()
    table = _table(model, device, shapes, measured)
    logger.info(
        "measured in %.1f s: a batch takes %.3g ms (%s)",
        *(time.perf_counter() - begun, table.dense / 1e6, table.says()),
    )
    return table


def _table(
    model: nn.Module, device: torch.device, shapes: tuple[tuple[int, ...], ...], measured: Measured
) -> LatencyTable:
    entries, dense, rest = settled(measured)
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    last = any(is_channels_last(p) for p in model.parameters())
    return LatencyTable(
        device=_name(device),
        dtype=str(next(floating)).removeprefix("torch."),
        memory_format="channels_last" if last else "contiguous",
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        example=shapes,
        dense=dense,
        spread=round(measured.spread, 4),
        rest=rest,
        entries=entries,
    )


def _name(device: torch.device) -> str:
    """What people call the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine() or "cpu")


def _require_numbers(grid: object, time_limit: object) -> None:
    if isinstance(grid, bool) or not isinstance(grid, int) or grid < 2:
        raise ConfigError(f"grid={grid!r}: a whole number of at least 2 is expected")
    if isinstance(time_limit, bool) or not isinstance(time_limit, (int, float)) or not time_limit > 0:
        raise ConfigError(f"time_limit={time_limit!r}: it must be above 0")
