"""Plans: data and networks x ratios x variants x seeds, in YAML, and the runs that one asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ocsfast.core.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """What is trained, and how, whatever the variant.

    Attributes:
        data: a name that `ocsfast.train` knows; "cifar10" may be read from image files.
        arch: a network of `ocsfast.train.models`.
        epochs: of a dense run; 0: the recipe's own.
        subset: training images, every class keeping its share; 0: all.
        size: of CIFAR's images, in pixels.
        batch: images a step; 0: the recipe's own.
        recipe: of `ocsfast.train.recipes`.
        lr: factor on the recipe's learning rate, where `batch` is another one than the recipe's.
        dtype: "float32", or "bfloat16" by autocast, with convolutions in channels_last.
        ratios: in the place of the plan's.
    """

    data: str
    arch: str
    epochs: int = 0
    subset: int = 0
    size: int = 32
    batch: int = 0
    recipe: str = "default"
    lr: float = 1.0
    dtype: str = "float32"
    ratios: tuple[float, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One way to come to a network of the given MACs.

    Attributes:
        kind: "dense"; "one-cycle"; "thinner": all layers thinner by one share, from scratch; "shape":
            the layer widths that the run `of` found, with new weights; "at-start": pruned before the
            first step; "random": as `of`, but random groups of each layer; "torch-pruning": trained
            dense, pruned, trained on.
        options: of `ocsfast.attach`.
        paper: the preset of `ocsfast.Config.paper` that `options` change, its epochs scaled to the run.
        choice: of `choices.CHOICES`, what goes instead of the library's own; "": that.
        of: the variant that "shape" and "random" take their widths from; where `cost` is given,
            "one-cycle" takes its cost an epoch, so that the cost is about the one asked for.
        start: "fresh", or "trained": the weights that the dense run of the same seed ended with.
        epochs: length of the training, as a share of the dense run's.
        cost: what the training may cost instead, in MACs, as a share of the dense run's; or the variant
            whose cost it is. Of "torch-pruning" it is the cost with the dense training.
        lr: factor on the task's learning rate.
        normalizer: what Torch-Pruning's scores of a layer are divided by: "mean", as is its default,
            or "none".
        curve: how often accuracy is measured on the way.
        ema: decay of an averaged copy that the cut follows; 0: none.
        tasks, ratios, seeds: those of the plan's where this variant is run; () for all.
    """

    kind: str
    options: Mapping[str, Any] | None = None
    paper: str = ""
    choice: str = ""
    of: str = ""
    start: str = "fresh"
    epochs: float = 1.0
    cost: float | str = 0.0
    lr: float = 1.0
    normalizer: str = "mean"
    curve: int = 0
    ema: float = 0.0
    tasks: tuple[str, ...] = ()
    ratios: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Run:
    """One training."""

    task: str
    variant: str
    ratio: float  # 0 where nothing is pruned
    seed: int

    @property
    def key(self) -> tuple[str, str, float, int]:
        return self.task, self.variant, self.ratio, self.seed

    @property
    def file_name(self) -> str:
        """A name for files about it."""
        return "-".join("".join(c if c.isalnum() else "_" for c in str(part)) for part in self.key)


@dataclass(frozen=True)
class Plan:
    """What a YAML file asks for; `checked.read` makes it."""

    tasks: Mapping[str, Task]
    ratios: tuple[float, ...]
    seeds: tuple[int, ...]
    variants: Mapping[str, Variant]

    def runs(self) -> Iterator[Run]:
        """Every run once, seed by seed."""
        for seed in self.seeds:
            for task in self.tasks:
                yield from self._of(task, seed)

    def _of(self, task: str, seed: int) -> Iterator[Run]:
        for dense in (True, False):
            for ratio in (0.0,) if dense else self.tasks[task].ratios or self.ratios:
                for name, variant in self.variants.items():
                    asked = (
                        (task, variant.tasks),
                        (seed, variant.seeds),
                        (ratio, () if dense else variant.ratios),
                    )
                    if dense == (variant.kind == "dense") and all(x in xs or not xs for x, xs in asked):
                        yield Run(task, name, ratio, seed)

    def needs(self, run: Run) -> tuple[Run, ...]:
        """The runs whose results another one starts from."""
        variant = self.variants[run.variant]
        others = [variant.of, variant.cost if isinstance(variant.cost, str) else ""]
        needed = [Run(run.task, name, run.ratio, run.seed) for name in others if name]
        if variant.start == "trained":
            needed.append(self.dense(run))
        return tuple(needed)

    def dense(self, run: Run) -> Run:
        """The dense run of the same task and seed.

        Raises:
            ConfigError: the plan has no dense variant.
        """
        for name, variant in self.variants.items():
            if variant.kind == "dense":
                return Run(run.task, name, 0.0, run.seed)
        raise ConfigError(f"{run} needs a variant of kind dense")

    def all_ratios(self) -> tuple[float, ...]:
        """Those of the plan and of its tasks."""
        own = (ratio for task in self.tasks.values() for ratio in task.ratios)
        return tuple(dict.fromkeys((*self.ratios, *own)))

    def definition(self, run: Run) -> str:
        """A hash of what a plan says of a training, but for ratio and seed; and of what it needs.

        Defaults that are not said are not in it: where one changes, rows have to be taken out by hand.
        """
        where = ("tasks", "ratios", "seeds")  # these say where a variant is run, not what it is
        said: list[dict[str, Any]] = []
        for part in (self.tasks[run.task], self.variants[run.variant]):
            plain = {field.name: field.default for field in fields(part)}
            given = {k: v for k, v in asdict(part).items() if k not in where and v != plain[k]}
            said.append({k: v for k, v in given.items() if v not in ({}, None)})
        text = json.dumps([said, [self.definition(need) for need in self.needs(run)]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
