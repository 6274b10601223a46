"""Reads a plan, and refuses what is wrong in it before anything is trained."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Hashable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from choices import CHOICES
from plan import Plan, Run, Task, Variant

from ocsfast.core.config import make_config
from ocsfast.core.errors import ConfigError
from ocsfast.train.data.catalogue import check_name
from ocsfast.train.models import ARCHITECTURES
from ocsfast.train.recipes import RECIPES

# The fields that each kind of run reads, beside where it is run.
_ALL = {"epochs", "lr", "curve"}
KINDS: Mapping[str, set[str]] = {
    "dense": {"curve"},
    "one-cycle": {"options", "paper", "choice", "of", "start", "cost", "ema", *_ALL},
    "thinner": {"cost", *_ALL},
    "shape": {"of", "cost", *_ALL},
    "at-start": {"options", *_ALL},
    "random": {"options", "of", *_ALL},
    "torch-pruning": {"start", "cost", "normalizer", *_ALL},
}
WHERE = {"kind", "tasks", "ratios", "seeds"}
# Options that the runs set themselves, or that say what was found before: the structure, the length.
SET = {"total_steps", "epochs", "target", "again", "keep", "only", "kinds", "outputs", "forward"}
SET |= {"uniform", "grouping", "verify", "time_limit", "capturable"}


class _Loader(yaml.SafeLoader):
    """YAML in which a name may not stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name!r} stands twice, {node.start_mark}")
        return super().construct_mapping(node, deep)


def read(path: Path) -> Plan:
    """A plan from a file.

    Raises:
        ConfigError: it cannot be read, or asks for something that there is not; it says what and where.
    """
    try:
        given = yaml.load(path.read_text(), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    wanted = ("tasks", "ratios", "seeds", "variants")
    if not isinstance(given, dict) or set(given) != set(wanted):
        raise ConfigError(f"{path}: a plan has {', '.join(wanted)}, and nothing else")
    for name in ("tasks", "variants"):
        if not isinstance(given[name], dict) or not given[name]:
            raise ConfigError(
                f"{path}: {name} is {given[name]!r}: names and what they mean are expected"
            )
        for key in given[name]:
            if not isinstance(key, str):
                raise ConfigError(
                    f"{path}: {name} has {key!r}: a name is expected, in quotes if need be"
                )
    tasks = {name: _made(Task, value, f"{path}: task {name}") for name, value in given["tasks"].items()}
    variants = {
        name: _made(Variant, value, f"{path}: variant {name}")
        for name, value in given["variants"].items()
    }
    ratios = _value(tuple[float, ...], given["ratios"], f"{path}: ratios")
    seeds = _value(tuple[int, ...], given["seeds"], f"{path}: seeds")
    plan = Plan(tasks, ratios, seeds, variants)
    for name, task in tasks.items():
        _check_task(task, f"{path}: task {name}")
    for name, variant in variants.items():
        _check_variant(plan, variant, f"{path}: variant {name}")
    _check_runs(plan, path)
    return plan


def _made(kind: type[Any], given: Any, where: str) -> Any:
    """A dataclass from a mapping."""
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: a mapping is expected, not {given!r}")
    types = get_type_hints(kind)
    for name in given:
        if name not in types:
            near = difflib.get_close_matches(str(name), types, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"{where}: {name} is unknown{hint}: choose from {', '.join(types)}")
    values = {name: _value(types[name], value, f"{where}: {name}") for name, value in given.items()}
    try:
        return kind(**values)
    except TypeError as error:  # a field is missing
        raise ConfigError(f"{where}: {error}") from error


def _value(kind: Any, given: Any, where: str) -> Any:
    """A value of a field's type."""
    inner = get_args(kind)
    if Ellipsis in inner:
        if not isinstance(given, list):
            raise ConfigError(f"{where}: a list is expected, as [{given}]")
        return tuple(_value(inner[0], value, where) for value in given)
    if isinstance(given, bool):
        raise ConfigError(f"{where}: {given} is not expected here")
    allowed = inner or (kind,)
    if float in allowed and isinstance(given, int | float) and math.isfinite(given):
        return float(given)
    if any(isinstance(given, part) for part in (int, str) if part in allowed):
        return given
    if type(None) in allowed and (given is None or isinstance(given, dict)):
        return given
    raise ConfigError(f"{where}: {given!r} is not a {' or '.join(_word(part) for part in allowed)}")


def _word(kind: Any) -> str:
    words = {float: "number", int: "whole number", str: "name"}
    return words.get(kind, "mapping")


def _check_task(task: Task, where: str) -> None:
    known = {"arch": ARCHITECTURES, "recipe": RECIPES, "dtype": ("float32", "bfloat16")}
    _check_names(task, known, where)
    try:
        check_name(task.data)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    for name in ("epochs", "subset", "batch"):
        if getattr(task, name) < 0:
            raise ConfigError(f"{where}: {name} {getattr(task, name)}: it must be at least 0")
    if task.lr <= 0 or task.size < 1:
        raise ConfigError(f"{where}: lr and size must be above 0")


def _check_names(part: Task | Variant, known: Mapping[str, Collection[str]], where: str) -> None:
    """Refuse a field that is none of the names known; "" means nothing, and is not told of."""
    for field, names in known.items():
        given = getattr(part, field)
        if given not in names:
            told = ", ".join(name for name in names if name)
            raise ConfigError(f"{where}: {field} {given!r}: choose from {told}")


def _check_variant(plan: Plan, variant: Variant, where: str) -> None:
    _check_names(variant, {"kind": KINDS}, where)
    for field in fields(Variant):
        given = getattr(variant, field.name)
        if field.name not in KINDS[variant.kind] | WHERE and given not in (field.default, {}):
            raise ConfigError(f"{where}: {field.name} means nothing to {variant.kind}")
    known = {"start": ("fresh", "trained"), "choice": ("", *CHOICES), "normalizer": ("mean", "none")}
    _check_names(variant, {**known, "paper": ("", "cifar", "imagenet")}, where)
    if variant.kind == "torch-pruning" and variant.start != "trained":
        raise ConfigError(f"{where}: torch-pruning prunes what was trained: start: trained")
    if variant.epochs <= 0 or variant.lr <= 0 or variant.curve < 0 or not 0 <= variant.ema < 1:
        raise ConfigError(f"{where}: epochs and lr must be above 0, curve at least 0, ema in [0, 1)")
    _check_cost(plan, variant, where)
    for name in variant.options or {}:
        if name in SET:
            raise ConfigError(f"{where}: {name}= is not for a plan to say: all runs have the same")
    try:
        make_config(dict(variant.options or {}))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    plans = {"tasks": plan.tasks, "ratios": plan.all_ratios(), "seeds": plan.seeds}
    for name, values in plans.items():
        for value in getattr(variant, name):
            if value not in values:
                raise ConfigError(f"{where}: {name} has {value!r}, which the plan has not")


def _check_cost(plan: Plan, variant: Variant, where: str) -> None:
    """What a training may cost, and the variants whose results it takes."""
    others = [variant.of] if variant.kind in ("shape", "random") else []
    if variant.kind == "one-cycle" and variant.cost:
        if variant.start == "trained":
            raise ConfigError(f"{where}: from trained weights, say epochs and not cost")
        others.append(variant.of)
    others += [variant.cost] if isinstance(variant.cost, str) else []
    for other in others:
        if other not in plan.variants or plan.variants[other].kind == "dense":
            raise ConfigError(
                f"{where}: it needs the pruned variant {other!r}, which is not in the plan"
            )
    if variant.kind in ("shape", "random") and plan.variants[variant.of].kind == "torch-pruning":
        raise ConfigError(f"{where}: what torch-pruning leaves is in no families: of: another variant")
    least = 1.0 if variant.start == "trained" else 0.0
    if isinstance(variant.cost, float) and variant.cost and variant.cost <= least:
        raise ConfigError(f"{where}: cost {variant.cost:g}: it must be above {least:g}")


def _check_runs(plan: Plan, path: Path) -> None:
    """Ratios, and that every run can come after those that it needs."""
    for ratio in plan.all_ratios():
        if not 0 < ratio < 1:
            raise ConfigError(f"{path}: ratio {ratio}: it must be between 0 and 1")
    if sum(variant.kind == "dense" for variant in plan.variants.values()) > 1:
        raise ConfigError(f"{path}: one variant may be dense: it is what costs are a share of")
    runs = list(plan.runs())
    if not runs:
        raise ConfigError(f"{path}: the plan has no runs: a seed and a ratio at least are expected")
    if not any(variant.kind == "dense" for variant in plan.variants.values()):
        trained = [name for name, variant in plan.variants.items() if variant.start == "trained"]
        if trained:
            raise ConfigError(f"{path}: variant {trained[0]} needs a variant of kind dense")
    done: set[Run] = set()
    while len(done) < len(runs):
        ready = [run for run in runs if run not in done and done.issuperset(plan.needs(run))]
        if not ready:
            run = next(run for run in runs if run not in done)
            needed = ", ".join(map(str, plan.needs(run)))
            raise ConfigError(f"{path}: {run} needs {needed}, which the plan does not make before it")
        done.update(ready)
