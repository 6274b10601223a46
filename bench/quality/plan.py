"""Plans: data and networks x ratios x variants x seeds, in YAML, and the runs that one asks for."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from choices import CHOICES

from ocsfast.core.config import make_config
from ocsfast.core.errors import ConfigError
from ocsfast.train.models import ARCHITECTURES
from ocsfast.train.recipes import RECIPES

KINDS = ("dense", "one-cycle", "thinner", "shape", "at-start", "random", "torch-pruning")


@dataclass(frozen=True)
class Task:
    """What is trained, and how, whatever the variant.

    Attributes:
        data: a name that `ocsfast.train` knows; "cifar10" may be read from image files.
        arch: a network of `ocsfast.train.models`.
        epochs: of a dense run; 0: the recipe's own.
        subset: training images, every class keeping its share; 0: all.
        size: of images from files, in pixels.
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
        of: the variant that "shape" and "random" take their widths from; where `cost` is given,
            "one-cycle" takes its cost an epoch.
        start: "fresh", or "trained": the weights that the dense run of the same seed ended with.
        epochs: length of the training, as a share of the dense run's.
        cost: what the training may cost instead, in MACs, as a share of the dense run's; or the variant
            whose cost it is. Of "torch-pruning" it is the cost with the dense training.
        lr: factor on the task's learning rate.
        curve: how often accuracy is measured on the way.
        choice: of `choices.CHOICES`, what goes instead of the library's own; "": that.
        ema: decay of an averaged copy that the cut follows; 0: none.
        tasks, ratios, seeds: those of the plan's where this variant is run; () for all.
    """

    kind: str
    options: Mapping[str, Any] | None = None
    paper: str = ""
    of: str = ""
    start: str = "fresh"
    epochs: float = 1.0
    cost: float | str = 0.0
    lr: float = 1.0
    curve: int = 0
    choice: str = ""
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


@dataclass(frozen=True)
class Plan:
    """What a YAML file asks for."""

    tasks: Mapping[str, Task]
    ratios: tuple[float, ...]
    seeds: tuple[int, ...]
    variants: Mapping[str, Variant]

    def runs(self) -> Iterator[Run]:
        """Every run once, seed by seed, a run after those that it needs."""
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
            needed.append(Run(run.task, self.dense(), 0.0, run.seed))
        return tuple(needed)

    def all_ratios(self) -> tuple[float, ...]:
        """Those of the plan and of its tasks."""
        own = (ratio for task in self.tasks.values() for ratio in task.ratios)
        return tuple(dict.fromkeys((*self.ratios, *own)))

    def dense(self) -> str:
        """The name of the dense variant."""
        return next(name for name, variant in self.variants.items() if variant.kind == "dense")


def read(path: Path) -> Plan:
    """A plan from a file.

    Raises:
        ConfigError: it cannot be read, or asks for something that there is not; it says what and where.
    """
    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    wanted = ("tasks", "ratios", "seeds", "variants")
    if not isinstance(given, dict) or set(given) != set(wanted):
        raise ConfigError(f"{path}: a plan has {', '.join(wanted)}, and nothing else")
    tasks = {
        name: _made(Task, fields_, f"{path}: task {name}") for name, fields_ in given["tasks"].items()
    }
    variants = {
        name: _made(Variant, fields_, f"{path}: variant {name}")
        for name, fields_ in given["variants"].items()
    }
    plan = Plan(tasks, tuple(map(float, given["ratios"])), tuple(map(int, given["seeds"])), variants)
    for name, task in tasks.items():
        _check_task(task, f"{path}: task {name}")
    for name, variant in variants.items():
        _check_variant(plan, variant, f"{path}: variant {name}")
    for ratio in plan.all_ratios():
        if not 0 < ratio < 1:
            raise ConfigError(f"{path}: ratio {ratio}: it must be between 0 and 1")
    known_runs = set(plan.runs())
    for run in plan.runs():
        for need in plan.needs(run):
            if need not in known_runs:
                raise ConfigError(f"{path}: {run} needs {need}, which the plan does not make")
    return plan


def _made(kind: type[Any], given: Any, where: str) -> Any:
    """A dataclass from a mapping; lists become tuples."""
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: a mapping is expected, not {given!r}")
    known = [field.name for field in fields(kind)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"{where}: {name} is unknown{hint}: choose from {', '.join(known)}")
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    except TypeError as error:  # a field is missing
        raise ConfigError(f"{where}: {error}") from error


def _check_task(task: Task, where: str) -> None:
    choices = {"arch": ARCHITECTURES, "recipe": RECIPES, "dtype": ("float32", "bfloat16")}
    for name, known in choices.items():
        if getattr(task, name) not in known:
            raise ConfigError(f"{where}: {name} {getattr(task, name)!r}: choose from {', '.join(known)}")


def _check_variant(plan: Plan, variant: Variant, where: str) -> None:
    if variant.kind not in KINDS:
        raise ConfigError(f"{where}: kind {variant.kind!r}: choose from {', '.join(KINDS)}")
    if variant.choice and (variant.choice not in CHOICES or variant.kind != "one-cycle"):
        known = ", ".join(CHOICES)
        raise ConfigError(f"{where}: choice {variant.choice!r}: of one-cycle, choose from {known}")
    if variant.start not in ("fresh", "trained"):
        raise ConfigError(f"{where}: start {variant.start!r}: choose from fresh, trained")
    of = variant.kind in ("shape", "random") or (variant.kind == "one-cycle" and variant.cost)
    others = [variant.of] if of else []
    others += [variant.cost] if isinstance(variant.cost, str) else []
    for other in others:
        if other not in plan.variants or plan.variants[other].kind == "dense":
            raise ConfigError(
                f"{where}: it needs the pruned variant {other!r}, which is not in the plan"
            )
    trained = variant.start == "trained"
    if trained and all(other.kind != "dense" for other in plan.variants.values()):
        raise ConfigError(f"{where}: start: trained needs a variant of kind dense in the plan")
    if variant.kind == "torch-pruning" and not trained:
        raise ConfigError(f"{where}: torch-pruning prunes what was trained: start: trained")
    try:
        make_config(dict(variant.options or {}))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    known = {"tasks": plan.tasks, "ratios": plan.all_ratios(), "seeds": plan.seeds}
    for name, values in known.items():
        for value in getattr(variant, name):
            if value not in values:
                raise ConfigError(f"{where}: {name} has {value!r}, which the plan has not")
