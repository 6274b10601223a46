"""Training one network, dense or one-cycle, and measuring it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

import ocsfast
from ocsfast import Config, Pruner, StepReport
from ocsfast.core.errors import StateError
from ocsfast.grouping.macs import count_macs
from ocsfast.train.data.source import Data, Source, iterations
from ocsfast.train.recipes import Recipe, make_optimizer, make_scheduler
from ocsfast.train.report.records import Check, Cut, EpochRow, FamilyWidth, NormSnapshot, RunResult

Training = Generator[EpochRow, None, RunResult]  # yields one row per epoch, returns the result


@dataclass(frozen=True, eq=False)
class Run:
    """A network that is ready to be trained."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    ratio: float | None = None  # None: dense
    pruner: Pruner | None = None
    set_up_seconds: float = 0.0


def prepare_dense(model: nn.Module, data: Data, recipe: Recipe) -> Run:
    """The plain training of `model`."""
    optimizer = make_optimizer(recipe, model)
    steps = recipe.epochs * iterations(data.train, recipe.batch_size)
    return Run("dense", model, optimizer, make_scheduler(recipe, optimizer, steps))


def prepare_one_cycle(model: nn.Module, data: Data, recipe: Recipe, ratio: float) -> Run:
    """The same training, in the course of which `ratio` of the MACs is removed.

    A loop that only calls `ocsfast.step` works as well. Attaching ahead of the loop has the advantage
    that a ratio that cannot be reached is an error before any training.
    """
    run = prepare_dense(model, data, recipe)
    device = next(model.parameters()).device
    start = time.perf_counter()
    pruner = ocsfast.attach(
        model,
        ratio,
        optimizer=run.optimizer,
        config=preset(recipe),
        example_inputs=torch.zeros(2, *data.shape, device=device),
        total_steps=recipe.epochs * iterations(data.train, recipe.batch_size),
    )
    seconds = time.perf_counter() - start
    return Run("one-cycle", model, run.optimizer, run.scheduler, ratio, pruner, seconds)


def preset(recipe: Recipe) -> Config | None:
    """The paper's options if the recipe asks for them, with epochs scaled to the length of the run."""
    if recipe.preset is None:
        return None
    paper = Config.paper(recipe.preset)

    def scaled(epoch: float | None) -> int | None:
        return None if epoch is None else max(1, round(epoch * recipe.epochs / recipe.preset_epochs))

    return replace(paper, sparsify_from=scaled(paper.sparsify_from), deadline=scaled(paper.deadline))


def train(run: Run, data: Data, recipe: Recipe, seed: int) -> Training:
    """Train `run` to its end, one epoch at a time.

    Args:
        seed: of the order of the images, their augmentation, and dropout.

    Yields:
        The row of each epoch.

    Returns:
        What is known of the run at its end.

    Raises:
        StateError: the loss is no longer finite.
    """
    device = next(run.model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    rows: list[EpochRow] = []
    snapshots: list[NormSnapshot] = []
    macs, cut = macs_per_sample(run.model, data.shape), None
    for epoch in range(1, recipe.epochs + 1):
        torch.manual_seed(seed + epoch)  # dropout then does not depend on what is trained in between
        start = clock(device)
        loss = train_epoch(run, data.train, recipe.batch_size, generator)
        train_seconds = clock(device) - start
        if not np.isfinite(loss):
            raise StateError(
                f"{run.name}: the loss of epoch {epoch} is {loss} at lr {recipe.lr}: lower --lr"
            )
        accuracy = evaluate(run.model, data.test, recipe.batch_size)
        report, step_seconds = None, 0.0
        if run.ratio is not None:
            start = clock(device)
            report = ocsfast.step(run.model, run.ratio, accuracy=accuracy)
            step_seconds = clock(device) - start
            if report.cut:
                before, accuracy = accuracy, evaluate(run.model, data.test, recipe.batch_size)
                macs = macs_per_sample(run.model, data.shape)
                cut = Cut(epoch, report.forced, before, accuracy)
            if run.pruner is not None and (report.cut or report.stage != "pruned"):
                snapshots.extend(_snapshot(epoch, run.pruner))
        lr = float(run.optimizer.param_groups[0]["lr"])
        row = EpochRow(
            run.name, epoch, loss, accuracy, lr, train_seconds, step_seconds, macs, **_columns(report)
        )
        rows.append(row)
        yield row
    return _result(run, rows, snapshots, macs, cut, iterations(data.train, recipe.batch_size))


def _result(
    run: Run,
    rows: list[EpochRow],
    snapshots: list[NormSnapshot],
    macs: int,
    cut: Cut | None,
    epoch_steps: int,
) -> RunResult:
    """What is known of a run at its end."""
    pruner = run.pruner
    history = pruner.history if pruner else []
    checks = tuple(Check(r.steps / epoch_steps, r.stability, r.mean_stability) for r in history)
    return RunResult(
        rows=tuple(rows),
        params=count_parameters(run.model),
        macs=macs,
        set_up_seconds=run.set_up_seconds,
        cut=cut,
        t_sl=checks[pruner.t_sl - 1].epoch if pruner and pruner.t_sl else None,
        checks=checks,
        widths=_widths(pruner) if pruner else (),
        snapshots=tuple(snapshots),
        frozen=tuple(f"{f.where}: {f.reason}" for f in pruner.families.frozen) if pruner else (),
    )


def in_turns(
    trainings: Mapping[str, Training], show: Callable[[EpochRow], None]
) -> dict[str, RunResult]:
    """Train several networks in turns, one epoch each.

    They take turns because their times are compared, and the speed of a machine drifts.

    Args:
        trainings: by name.
        show: called with every row as soon as it is known.

    Returns:
        The results, by the same names.
    """
    results: dict[str, RunResult] = {}
    while len(results) < len(trainings):
        for name, training in trainings.items():
            if name not in results:
                try:
                    show(next(training))
                except StopIteration as end:
                    results[name] = end.value
    return results


def train_epoch(run: Run, source: Source, batch_size: int, generator: torch.Generator) -> float:
    """Train for one epoch, and return the mean loss of its batches."""
    run.model.train()
    losses: list[Tensor] = []
    for images, labels in source.batches(batch_size, generator):
        loss = nn.functional.cross_entropy(run.model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.scheduler.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


@torch.no_grad()
def evaluate(model: nn.Module, source: Source, batch_size: int) -> float:
    """Accuracy on a split in percent. Leaves the model in evaluation mode."""
    model.eval()
    hits = [(model(images).argmax(1) == labels).sum() for images, labels in source.batches(batch_size)]
    return 100 * float(torch.stack(hits).sum()) / len(source)


@torch.no_grad()
def macs_per_sample(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one sample's forward pass."""
    training = model.training
    model.eval()
    image = torch.zeros(1, *shape, device=next(model.parameters()).device)
    counted = count_macs(lambda: model(image))
    model.train(training)
    return counted


def count_parameters(model: nn.Module) -> int:
    """The number of all parameters' elements."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def paired_latency(models: Sequence[nn.Module], images: Tensor, rounds: int = 40) -> list[float]:
    """The median time of a forward pass of each model, in seconds.

    The models take turns, because the speed of a machine drifts: measured one after the other, they
    would be compared at different speeds.
    """
    for model in models:
        model.eval()
        for _ in range(3):
            model(images)
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, samples in zip(models, seconds, strict=True):
            start = clock(images.device)
            model(images)
            samples.append(clock(images.device) - start)
    return [float(np.median(samples)) for samples in seconds]


def clock(device: torch.device) -> float:
    """The time in seconds, read once the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _columns(report: StepReport | None) -> dict[str, Any]:
    """The fields of an epoch's row that come from the report of `ocsfast.step`."""
    if report is None:
        return {}
    if report.stage == "pruned" and not report.cut:  # after the cut, nothing is measured
        return {"stage": report.stage, "nats": report.nats}
    return {
        "stage": report.stage,
        "stability": report.stability,
        "mean_stability": report.mean_stability,
        "strength": report.lam,
        "nats": report.nats,
        "residual": report.residual,
        "changed": report.changed,
        "macs_at_cut": report.cost_at_cut,
        "cut": report.cut,
        "forced": report.forced,
    }


def _snapshot(epoch: int, pruner: Pruner) -> list[NormSnapshot]:
    """The scores and the choice of the last check; an empty list before the first."""
    if pruner.scores is None or pruner.mask is None:
        return []
    scores = pruner.scores.detach().cpu().double().numpy()
    return [NormSnapshot(epoch, scores, pruner.mask.detach().cpu().numpy().astype(bool))]


def _widths(pruner: Pruner) -> tuple[FamilyWidth, ...]:
    """The kept and the original number of groups in each family, by the last check."""
    kept = pruner.history[-1].kept
    return tuple(FamilyWidth(name, size, stays) for name, stays, size in kept)
