"""One training run of a plan: its network, its loop, and what came of it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from choices import CHOICES, Drawn
from networks import macs_of, torch_pruned, uniform_widths, with_widths
from plan import Plan, Run, Task, Variant
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import ocsfast
from ocsfast import Families, Pruner
from ocsfast.choice.budget import budget_of
from ocsfast.core.errors import ConfigError, StateError
from ocsfast.train.data.catalogue import load
from ocsfast.train.data.memory import Augmentation, Images, in_memory, subset
from ocsfast.train.data.source import Data, Request, Source, iterations
from ocsfast.train.loop import clock, count_parameters, macs_per_sample, preset
from ocsfast.train.models import build_model
from ocsfast.train.recipes import Recipe, make_optimizer, make_scheduler, recipe

Row = dict[str, Any]
STATISTICS = 8  # batches from which batch norms take new statistics


def data_of(task: Task, images: str, device: torch.device) -> Data:
    """A task's data, on the device that trains on it.

    Args:
        images: where CIFAR's are: a folder, or a file of bench/images.py; "": torchvision's files.

    Raises:
        ConfigError: they are not there, or of another size than the task's.
    """
    if not task.data.startswith("cifar"):
        images = ""
    data = _loaded(task.data, task.subset, task.size, images, device)
    if task.data.startswith("cifar") and data.shape[1] != task.size:
        raise ConfigError(
            f"{images or data.name} has images of {data.shape[1]} pixels, the plan wants {task.size}: "
            "--images FOLDER has them resized"
        )
    return data


@functools.cache
def _loaded(name: str, count: int, size: int, images: str, device: torch.device) -> Data:
    request = Request(subset=count or None, image_size=size, device=device)
    if not images.endswith(".pt"):
        return load(f"folder:{images}" if images else name, request)
    if not Path(images).exists():
        raise ConfigError(f"{images} is not there: python bench/images.py ARCHIVE {images}")
    splits = torch.load(images)
    train, test = (Images(*splits[split]) for split in ("train", "test"))
    classes = [str(label) for label in train.labels.unique().tolist()]
    augmentation = Augmentation(pad=train.pixels.shape[-1] // 8, flip=True)
    return in_memory(name, subset(train, request), test, classes, augmentation, device)


@functools.cache
def structure_of(arch: str, classes: int, shape: tuple[int, int, int]) -> Families:
    """The families of an architecture, which all of its networks share."""
    model = build_model(arch, classes, shape[0], shape[1])
    return ocsfast.group(model, torch.zeros(2, *shape))


@dataclass
class Trainee:
    """A network in training, and what it has cost."""

    task: Task
    recipe: Recipe
    data: Data
    model: nn.Module
    steps: int
    curve: int = 0
    pruner: Pruner | None = None
    average: AveragedModel | None = None
    found: Row = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.optimizer = make_optimizer(self.recipe, self.model)
        self.scheduler = make_scheduler(self.recipe, self.optimizer, self.steps)

    def attach(self, variant: Variant, families: Families, ratio: float) -> None:
        """Let a share of the MACs go on the way."""
        config = None
        if variant.paper:
            theirs = recipe(f"paper-{variant.paper}", self.task.data, self.task.arch)
            each = iterations(self.data.train, self.recipe.batch_size)
            config = preset(dataclasses.replace(theirs, epochs=max(1, round(self.steps / each))))
        if variant.ema:
            decay = get_ema_multi_avg_fn(variant.ema)
            self.average = AveragedModel(self.model, multi_avg_fn=decay, use_buffers=True)
        self.pruner = ocsfast.attach(
            self.model,
            ratio,
            optimizer=self.optimizer,
            families=families,
            total_steps=self.steps,
            also=[self.average] if self.average is not None else (),
            config=config,
            **(variant.options or {}),
        )

    def cut_now(self) -> None:
        """Cut before the first step."""
        kept = self.pruner.cut().kept
        self.found |= {"cut": 0.0, "kept": [count for _, count, _ in kept]}
        self.pruner = None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        half = self.task.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if half else contextlib.nullcontext()

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without end, an epoch after another."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for images, labels in self.data.train.batches(self.recipe.batch_size, generator):
                yield self._placed(images), labels

    def _placed(self, images: Tensor) -> Tensor:
        if self.task.dtype != "bfloat16":
            return images
        return images.contiguous(memory_format=torch.channels_last)

    def train(self, seed: int) -> Row:
        """Train to the end.

        Raises:
            StateError: the loss is no longer finite.
        """
        torch.manual_seed(seed)
        macs, work, watch = macs_per_sample(self.model, self.data.shape), 0, Watch(self.device)
        epoch = iterations(self.data.train, self.recipe.batch_size)
        batches, losses = self.batches(seed), []
        self.model.train()
        watch.go()
        for step in range(1, self.steps + 1):
            losses.append(self._step(*next(batches)))
            work += macs
            if self._cut(step, epoch):
                watch.stop()
                macs = macs_per_sample(self.model, self.data.shape)
                self.found["cut"] = step / self.steps
                self.found["accuracy_at_cut"] = self.evaluate(self.data.test)[0]
                watch.go()
            if self.curve and step % max(1, self.steps // self.curve) == 0:
                watch.stop()
                self.found.setdefault("curve", []).append([step / self.steps, *self.on_the_way(seed)])
                watch.go()
            if step % epoch == 0 or step == self.steps:
                if not math.isfinite(float(torch.stack(losses).mean())):
                    raise StateError(f"the loss is not finite at step {step} of {self.steps}")
                losses.clear()
        watch.stop()
        if self.pruner is not None and self.pruner.stage != "pruned":
            raise StateError("the run is over, and the network was not cut")
        accuracy, loss = self.evaluate(self.data.test)
        if self.average is not None:
            self.found["average"] = self.evaluate(self.data.test, self.average)[0]
        return {
            "accuracy": accuracy,
            "loss": loss,
            "macs": macs,
            "parameters": count_parameters(self.model),
            "steps": self.steps,
            "work": work,
            "seconds": watch.seconds,
            "cpu_seconds": watch.cpu_seconds,
            **self.found,
        }

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward, backward and the optimizer's step; the loss."""
        with self.autocast():
            loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return loss.detach()

    def _cut(self, step: int, epoch: int) -> bool:
        """Make a check if one is due; whether it has cut the network."""
        pruner = self.pruner
        if pruner is None or pruner.stage == "pruned":
            return False
        if pruner.config.check_every == "call" and step % epoch:
            return False
        report = pruner.step()
        if report.cut:
            began = pruner.history[pruner.t_sl - 1].steps if pruner.t_sl else step
            self.found |= {"began": began / self.steps, "forced": report.forced}
            self.found |= {"residual": report.residual, "nats": report.nats}
            self.found["kept"] = [kept for _, kept, _ in report.kept]
        return report.cut

    def on_the_way(self, seed: int) -> list[float]:
        """Accuracy now, of the model, of it with fresh statistics in its batch norms, of its average."""
        fresh = copy.deepcopy(self.model)
        batches = itertools.islice(self.batches(seed), STATISTICS)
        update_bn((images for images, _ in batches), fresh)
        models = [self.model, fresh, *([] if self.average is None else [self.average])]
        return [self.evaluate(self.data.test, model)[0] for model in models]

    @torch.no_grad()
    def evaluate(self, source: Source, model: nn.Module | None = None) -> tuple[float, float]:
        """Accuracy in percent and mean cross entropy on a split; the model goes on training."""
        model = model or self.model
        model.eval()
        hits = torch.zeros((), device=self.device)
        loss = torch.zeros((), device=self.device)
        for images, labels in source.batches(500):
            with self.autocast():
                logits = model(self._placed(images)).float()
            hits += (logits.argmax(1) == labels).sum()
            loss += F.cross_entropy(logits, labels, reduction="sum")
        model.train()
        return 100 * float(hits) / len(source), float(loss) / len(source)


class Watch:
    """Wall-clock and processor time, of what runs between `go` and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = self.cpu_seconds = 0.0

    def go(self) -> None:
        self._wall, self._cpu = clock(self.device), time.process_time()

    def stop(self) -> None:
        self.seconds += clock(self.device) - self._wall
        self.cpu_seconds += time.process_time() - self._cpu


class Bench:
    """Makes the runs of a plan, one at a time.

    Args:
        images: as of `data_of`.
        weights: folder where dense runs leave the weights that others start from.
    """

    def __init__(self, plan: Plan, images: str, weights: Path, device: torch.device) -> None:
        self.plan, self.images, self.weights, self.device = plan, images, weights, device

    def require_data(self) -> None:
        """Read the data of all tasks, so that a mistake shows before anything is trained.

        Raises:
            ConfigError: they are not there.
        """
        for task in self.plan.tasks.values():
            data_of(task, self.images, self.device)

    def run(self, run: Run, needed: dict[str, Row]) -> Row:
        """Train one network.

        Args:
            needed: rows of `Plan.needs`, by variant.

        Returns:
            What came of it. `work` is the sum over all steps of the MACs of one sample's forward pass,
            `cost` that as a share of the dense run's.

        Raises:
            OcsfastError: it cannot be trained so.
        """
        for name, row in needed.items():
            if "error" in row:
                raise StateError(f"it needs {name}, which failed: {row['error']}")
        task, variant = self.plan.tasks[run.task], self.plan.variants[run.variant]
        data = data_of(task, self.images, self.device)
        how = recipe(task.recipe, task.data, task.arch)
        epochs, batch = task.epochs or how.epochs, task.batch or how.batch_size
        rate = variant.lr * task.lr * how.lr
        how = dataclasses.replace(how, epochs=epochs, batch_size=batch, lr=rate)
        families = structure_of(task.arch, len(data.classes), data.shape)
        dense = macs_of(families)(families.sizes)
        budget = budget_of(dense, run.ratio) if run.ratio else dense
        kept = needed[variant.of]["kept"] if variant.kind in ("shape", "random") else None
        if variant.kind == "thinner":
            kept = uniform_widths(families, budget)
        model = self._network(run, data, families, kept, budget)
        total, before = epochs * iterations(data.train, batch), float(variant.start == "trained")
        first = macs_per_sample(model, data.shape) / dense
        share = length(variant, needed, before, first, epochs)
        trainee = Trainee(task, how, data, model, max(1, round(share * total)), variant.curve)
        if variant.kind in ("one-cycle", "random", "at-start"):
            trainee.attach(variant, families, run.ratio)
        if variant.choice:
            trainee.pruner._parts.aim = CHOICES[variant.choice](trainee.pruner)
        if variant.kind == "random":
            aim = trainee.pruner._parts.aim
            drawn = Drawn(families, kept, run.seed)
            trainee.pruner._parts.aim = dataclasses.replace(aim, ranking=drawn)
        if variant.kind == "at-start":
            trainee.cut_now()
        if kept is not None:
            trainee.found["kept"] = kept
        row = trainee.train(run.seed)
        if variant.kind == "dense":
            self.weights.mkdir(parents=True, exist_ok=True)
            partial = self._weights_of(run).with_suffix(f".{os.getpid()}")
            torch.save(model.state_dict(), partial)
            partial.replace(self._weights_of(run))
        if row["macs"] > budget:
            raise StateError(f"{row['macs']} MACs are left, {budget} were asked for")
        cost = before + row["work"] / (total * dense)
        return {"macs_dense": dense, "epochs": share * epochs, "cost": cost, **row}

    def _network(
        self, run: Run, data: Data, families: Families, kept: list[int] | None, budget: int
    ) -> nn.Module:
        """The network that a run begins with, on its device."""
        task, variant = self.plan.tasks[run.task], self.plan.variants[run.variant]
        torch.manual_seed(run.seed)
        model = build_model(task.arch, len(data.classes), data.shape[0], data.shape[1])
        if kept is not None and variant.kind != "random":
            with_widths(model, families, kept)
        if variant.start == "trained":
            path = self._weights_of(run)
            if not path.exists():  # the results came without them
                self.run(self.plan.dense(run), {})
            model.load_state_dict(torch.load(path, map_location="cpu"))
        model = model.to(self.device)
        if variant.kind == "torch-pruning":
            model = torch_pruned(model, data.shape, budget, variant.normalizer)
        return model.to(memory_format=torch.channels_last) if task.dtype == "bfloat16" else model

    def _weights_of(self, run: Run) -> Path:
        """Where the dense run of the same task and seed leaves its weights."""
        dense = self.plan.dense(run)
        return self.weights / f"{dense.file_name}-{self.plan.definition(dense)}.pt"


def length(variant: Variant, needed: dict[str, Row], before: float, macs: float, epochs: int) -> float:
    """How long a training is, in dense runs' steps.

    Args:
        needed: rows of `Plan.needs`, by variant.
        before: what was spent already, in dense runs.
        macs: of a step, as a share of a dense run's.
        epochs: of a dense run.

    Raises:
        ConfigError: more was spent already than it may cost.
    """
    if not variant.cost:
        return variant.epochs
    cost = variant.cost if isinstance(variant.cost, float) else needed[variant.cost]["cost"]
    if variant.kind == "one-cycle":  # of which a step costs less after the cut
        other = needed[variant.of]
        return cost / other["cost"] * other["epochs"] / epochs
    if cost <= before:
        raise ConfigError(f"cost {cost:g}: the dense training alone has cost {before:g}")
    return (cost - before) / macs
