"""The options: one frozen dataclass, checked when it is made, and here alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from ocsfast.core.criteria import CRITERIA, Criterion, reads_gradients
from ocsfast.core.errors import ConfigError
from ocsfast.core.families import DEFAULT_KINDS, KINDS, Families, Lookup, Product
from ocsfast.core.latency import LatencyRecord

Target = str | Mapping[str, float] | LatencyRecord | Callable[[Families], Sequence[Product | Lookup]]

# What a cost can be counted in, and the unit of each.
UNITS = {"flops": "MACs", "params": "parameters", "bytes": "bytes", "latency": "nanoseconds"}
LATENCY = "latency"  # the one that is measured, on a device, and not counted
TARGETS = tuple(name for name in UNITS if name != LATENCY)

_CHOICES = {
    "strength": ("auto", "paper"),
    "shape": ("linear", "cubic"),
    "growth": ("linear", "recursive"),
    "penalty": ("auto", "both", "lasso", "shrink", "none"),
    "grouping": ("labels", "torch-pruning"),
    "normalize": ("none", "kind", "family", "geometric", "isomorphic"),
    "cost_aware": (False, True),
    "uniform": (False, True),
    "give_back": (False, True),
}


LENGTHS = ("total_steps", "epochs")  # one of them says how long the run is
# These say when things happen, not what goes: a run may resume with other values.
PLAN = (*LENGTHS, "check_every")


@dataclass(frozen=True)
class Config:
    """How to prune; every field has a default that needs no tuning.

    A *check* is one evaluation of saliency, partition and stability: the paper's epoch. A *group* is
    what goes as a whole: a channel, an attention head, a neuron. A *family* is all groups of the same
    coupled layers. Shares are of the run's optimizer steps; how many these are comes from `total_steps`
    or `epochs`, else from the learning-rate scheduler. If nothing tells, the stages are planned by the
    checks seen so far.

    Attributes:
        target: What `ratio` is a share of: "flops" (multiply-accumulates of a forward pass), "params",
            "bytes", weights for several of these as in {"flops": 2, "params": 1}; "latency" (the time of
            the example inputs, measured at attach) or a `LatencyTable` of any device; or a function from
            `Families` to the summands of a cost, a sequence of `Product` and `Lookup`.
        max_family_ratio: The largest share of one family's groups that may go, in (0, 1]. One group
            always stays.
        round_to: Each kept count is a multiple of this, if the family loses any group. "auto": the kept
            outputs of a layer are multiples of what the device computes at once, 16 on a CPU with
            AVX-512 and 8 elsewhere, of less in small families and where a ratio needs finer ones.
        give_back: Whether groups stay that the budget has room for: where the last group to go is a
            coarse one, as a head of all layers, those with the highest scores of other families are not
            needed beside it.
        keep: Modules, or shell patterns of module or parameter names, that stay as they are.
        only: The same; if given, no other layer may lose outputs.
        kinds: Which kinds of groups may go: of "head", "head_dim", "width", "channel", "neuron".
        outputs: Shell patterns of the model's outputs that keep their shape; None means all of them.
        forward: Traced instead of the model's own forward pass: a function of the model and its inputs.
        normalize: Which scores compare. "none": all as they are. "kind": each divided by the mean of its
            kind. "family": by the mean of its family. "geometric": by the root of that mean.
            "isomorphic": only among families of equal structure, each such set losing the same share
            (Isomorphic Pruning, arXiv 2407.04616).
        cost_aware: Whether scores are divided by what a group of their family costs of the target, so
            that dear groups go sooner and fewer do (HALP, arXiv 2110.10811). After `normalize`, whose
            equal shares it shifts.
        uniform: Whether families of one kind and size keep equally many groups, as a model's config can
            say.
        criterion: What scores a group: a name in `ocsfast.core.criteria.CRITERIA` ("l2" is Eq. 2), or a
            function (weight, gradient or None, optimizer state) -> a tensor of the weight's shape.
        include_bias: Whether biases count in saliency and penalty. They are cut in any case.
        lag: i of Eq. 3, in checks: a partition is compared with the one so many checks before.
        window: r of Eq. 4 and 5, in checks: the length of the moving average.
        tau: Eq. 5: sparsity learning begins once the mean stability rises by no more than this.
        epsilon: Eq. 6: the cut comes once the mean stability is at least 1 - epsilon.
        observe: The share of the run that Eq. 5 waits for, in [0, 1): before it, choices rest on weights
            that have hardly been trained.
        sparsify_from: The check at which sparsity learning begins; None leaves it to Eq. 5.
        max_residual: The cut waits until the pruned groups' mean saliency is below this share of the
            kept ones'; None does not wait.
        deadline: When the cut comes at the latest: a share of the run (float), a check (int), or None.
        penalty: "both" (Eq. 8 and 9), "lasso" (Eq. 8), "shrink" (Eq. 9) or "none". "auto" is
            "both", but "shrink" where `criterion` reads gradients or what the optimizer keeps of them,
            as a function may: Eq. 8 would be part of these, and what it shrinks score higher for it.
        strength: "auto": lambda grows so that lambda * lr sums to `nats` over the planned stage.
            "paper": Eq. 7 with `lambda0`, `delta`, `delta_every` and `growth`, whatever that sums to.
        one_pass: Whether steps of torch's own SGD, Adam and AdamW take the penalty in one pass with the
            weights they step, instead of in two more.
        nats: "auto": the sum of lambda * lr; Eq. 9 alone shrinks a pruned weight by exp(-nats).
        span: "auto": the planned stage's share of the run, in (0, 1).
        shape: "auto": "linear" or "cubic" growth of lambda * lr over the stage.
        lambda0: lambda_0 of Eq. 7.
        delta: The increment of Eq. 7.
        delta_every: Checks between two increments.
        growth: "linear": lambda_0 + delta * n. "recursive": Eq. 7 as printed, which adds these up.
        total_steps: Optimizer steps of the whole run; None asks the scheduler.
        epochs: Epochs of the whole run, counted from its first, if `ocsfast.step` is called once in
            each.
        check_every: Optimizer steps between checks; "call": a check in each call of `step`, the paper's
            epoch; "auto": as many in every run, however long its epochs; see `Pruner.step`.
        capturable: Whether optimizer steps are captured in a CUDA graph.
        again: Cut a model further that was cut before; `ratio` is still of the dense model.
        grouping: "labels" (ours) or "torch-pruning" (its DepGraph, for models that do not export).
        verify: Whether the groups are proved on a copy of the model.
        time_limit: Seconds that finding and proving the groups may take.

    Raises:
        ConfigError: a value that is not allowed. The message names the field, the value and what is
        allowed.

    Examples:
        >>> Config(target="params", max_family_ratio=0.5).target
        'params'
    """

    # What shrinks.
    target: Target = "flops"
    max_family_ratio: float = 0.75
    round_to: int | str = 1
    give_back: bool = True
    keep: tuple[str | nn.Module, ...] = ()
    only: tuple[str | nn.Module, ...] = ()
    kinds: tuple[str, ...] = DEFAULT_KINDS
    outputs: tuple[str, ...] | None = None
    forward: Callable[..., Any] | None = None
    normalize: str = "none"
    cost_aware: bool = False
    uniform: bool = False
    criterion: Criterion = "l2"
    include_bias: bool = False

    # Stability, Eq. 3-6.
    lag: int = 2
    window: int = 3
    tau: float = 1e-4
    epsilon: float = 1e-3
    observe: float = 0.1
    sparsify_from: int | None = None
    max_residual: float | None = 0.05
    deadline: float | int | None = 0.6

    # Penalty, Eq. 7-9.
    penalty: str = "auto"
    strength: str = "auto"
    one_pass: bool = True
    nats: float = 3.0
    span: float = 0.2
    shape: str = "linear"
    lambda0: float = 1e-4
    delta: float = 1e-4
    delta_every: int = 1
    growth: str = "linear"

    # The run.
    total_steps: int | None = None
    epochs: int | None = None
    check_every: int | str = "auto"
    capturable: bool = False
    again: bool = False

    # Grouping.
    grouping: str = "labels"
    verify: bool = True
    time_limit: float = 300.0

    def __post_init__(self) -> None:
        """Check every field, and make sequences tuples."""
        self._settle_names()
        _check_choices(self)
        _check_target(self.target)
        _check_criterion(self.criterion)
        _check_numbers(self)
        if self.total_steps is not None and self.epochs is not None:
            raise ConfigError(
                f"total_steps={self.total_steps} and epochs={self.epochs} both say how long the run is: "
                "give one of them"
            )

    def _settle_names(self) -> None:
        """`keep`, `only`, `kinds` and `outputs` as tuples of what they may hold; and `forward`."""
        nothing = {"keep": (), "only": (), "kinds": DEFAULT_KINDS, "outputs": None}
        for name, empty in nothing.items():
            value = getattr(self, name)
            if value is None:
                value = empty
            elif isinstance(value, (str, nn.Module)):
                value = (value,)
            elif not isinstance(value, Iterable):
                raise ConfigError(f"{name}={value!r}: a sequence is expected")
            object.__setattr__(self, name, None if value is None else tuple(value))
        if self.forward is not None and not callable(self.forward):
            raise ConfigError(f"forward={self.forward!r}: a function of model and inputs is expected")
        for name in ("keep", "only"):
            for entry in getattr(self, name):
                if not isinstance(entry, (str, nn.Module)):
                    raise ConfigError(f"{name}= holds {entry!r}: name patterns or modules are expected")
        for kind in self.kinds:
            if kind not in KINDS:
                raise ConfigError(f"kinds= holds {kind!r}: choose from {', '.join(KINDS)}")

    def length(self) -> str:
        """The run's length as these options say it, as "epochs=90"; "" where they say nothing."""
        values = ((name, getattr(self, name)) for name in LENGTHS)
        return ", ".join(f"{name}={value}" for name, value in values if value is not None)

    def settled_penalty(self) -> str:
        """`penalty`, with what "auto" is in its place."""
        if self.penalty != "auto":
            return self.penalty
        return "shrink" if reads_gradients(self.criterion) else "both"

    def plain(self) -> dict[str, Any]:
        """The fields that numbers and words say, as such: what a saved run is compared by."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["penalty"] = self.settled_penalty()
        if isinstance(self.target, LatencyRecord):
            values["target"] = LATENCY  # what was measured is saved apart
        # These do not change what is found.
        for name in ("verify", "time_limit", "capturable", "one_pass"):
            del values[name]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if isinstance(value, (bool, int, float, str, type(None)))
            or (isinstance(value, tuple) and all(isinstance(entry, str) for entry in value))
        }

    @classmethod
    def paper(cls, data: str, **overrides: Any) -> Config:
        """The paper's settings (Table 8) for "cifar" or "imagenet".

        Lambda grows by `delta` every `delta_every` checks, as the paper's prose says and the code that
        gave its figures does; `growth="recursive"` is Eq. 7 as printed, which sums those increments up
        and ends some twenty times higher. Checks must come once an epoch. `deadline` is the authors'
        script's `sl_end_epoch`; no residual is asked for, and nothing is given back. Any field may be
        overridden.

        Raises:
            ConfigError: another name, or an unknown field.
        """
        if data not in ("cifar", "imagenet"):
            raise ConfigError(f"Config.paper({data!r}): use 'cifar' or 'imagenet'")
        preset: dict[str, Any] = {
            "check_every": "call",
            "strength": "paper",
            "growth": "linear",
            "lambda0": 1e-4,
            "delta": 1e-4,
            "delta_every": 1 if data == "cifar" else 2,
            "tau": 1e-4,
            "epsilon": 1e-3,
            "observe": 0.0,
            "sparsify_from": 30 if data == "cifar" else None,
            "deadline": 110 if data == "cifar" else 50,
            "max_residual": None,
            "normalize": "none",
            "round_to": 1,
            "give_back": False,
        }
        return make_config({**preset, **overrides})


def make_config(options: dict[str, Any]) -> Config:
    """A `Config` from keyword arguments.

    Raises:
        ConfigError: an unknown option (the nearest known one is named), or a bad value.
    """
    import difflib

    known = [field.name for field in fields(Config)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" (did you mean {near[0]}=?)" if near else ""
            raise ConfigError(f"{name}= is not an option{hint}. Options: {', '.join(known)}")
    return Config(**options)


def _check_choices(config: Config) -> None:
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            known = ", ".join(map(str, choices))
            raise ConfigError(f"{name}={getattr(config, name)!r} is not known: use one of {known}")


def _check_criterion(criterion: object) -> None:
    if not callable(criterion) and criterion not in CRITERIA:
        raise ConfigError(
            f"criterion={criterion!r} is not known: use one of {', '.join(CRITERIA)}, or "
            "a function of a weight, its gradient and its optimizer state"
        )


def _check_numbers(config: Config) -> None:
    for name in ("lag", "window", "delta_every"):
        _check_integer(name, getattr(config, name), 1)
    for name in ("tau", "epsilon", "nats", "lambda0", "delta"):
        _check_number(name, getattr(config, name), "at least 0", lambda x: x >= 0)
    _check_number("max_family_ratio", config.max_family_ratio, "in (0, 1]", lambda x: 0 < x <= 1)
    _check_number("time_limit", config.time_limit, "above 0", lambda x: x > 0)
    _check_number("span", config.span, "in (0, 1)", lambda x: 0 < x < 1)
    _check_number("observe", config.observe, "in [0, 1)", lambda x: 0 <= x < 1)
    if config.max_residual is not None:
        _check_number("max_residual", config.max_residual, "above 0, or None", lambda x: x > 0)
    for name in ("sparsify_from", "total_steps", "epochs"):
        if getattr(config, name) is not None:
            _check_integer(name, getattr(config, name), 1)
    if isinstance(config.deadline, float):
        _check_number(
            "deadline",
            config.deadline,
            "a share in (0, 1] (a whole number is a check, e.g. 50)",
            lambda x: 0 < x <= 1,
        )
    elif config.deadline is not None:
        _check_integer("deadline", config.deadline, 1)
    if config.round_to != "auto":
        _check_integer("round_to", config.round_to, 1, "'auto' or an integer")
    if config.check_every not in ("auto", "call"):
        _check_integer("check_every", config.check_every, 1, "'auto', 'call' or an integer")


def _check_target(target: object) -> None:
    if callable(target) or isinstance(target, LatencyRecord):
        return
    if isinstance(target, str) and target in UNITS:
        return
    if isinstance(target, Mapping) and target:
        for name, share in target.items():
            if name not in TARGETS:
                why = ", and is no sum of counts" if name == LATENCY else ""
                raise ConfigError(f"target={target!r}: {name!r} is not one of {', '.join(TARGETS)}{why}")
            _check_number(f"target[{name!r}]", share, "above 0", lambda x: x > 0)
        return
    raise ConfigError(
        f"target={target!r} is not known: use one of {', '.join(UNITS)}, weights as in "
        "{'flops': 2, 'params': 1}, a LatencyTable, or a callable that turns Families into a sequence "
        "of Product and Lookup"
    )


def _check_integer(name: str, value: object, least: int, wanted: str = "an integer") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}: {wanted} of at least {least} is expected")


def _check_number(name: str, value: object, wanted: str, test: Callable[[float], bool]) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not test(value):  # type: ignore[arg-type]
        raise ConfigError(f"{name}={value!r}: it must be {wanted}")
