"""The options: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from numbers import Real
from typing import Any

from torch import nn

from ocsfast.choice import saliency as criteria
from ocsfast.choice.ranking import NORMALIZE
from ocsfast.choice.saliency import Criterion
from ocsfast.core.errors import ConfigError
from ocsfast.core.families import DEFAULT_KINDS, KINDS, Families, Product
from ocsfast.cut.record import TARGETS

Target = str | Mapping[str, float] | Callable[[Families], Sequence[Product]]

_CHOICES = {
    "strength": ("auto", "paper"),
    "shape": ("linear", "cubic"),
    "growth": ("linear", "recursive"),
    "penalty": ("both", "lasso", "shrink", "none"),
    "grouping": ("labels", "torch-pruning"),
    "normalize": NORMALIZE,
    "uniform": (False, True),
}


LENGTHS = ("total_steps", "epochs")  # one of them says how long the run is
PLAN = (*LENGTHS, "check_every")  # say when things happen, not what goes: a run may resume with others


@dataclass(frozen=True)
class Config:
    """How to prune; every field has a default that needs no tuning.

    A *check* is one evaluation of saliency, partition and stability: the paper's epoch. Shares are
    of the run's optimizer steps, which come from `total_steps` or `epochs`, else from the learning-rate
    scheduler; where nothing tells, the stages are planned by the number of checks seen (see
    `schedule.py`).
    """

    # What shrinks.
    target: Target = "flops"  # "params", "bytes", shares of these, or families -> the cost's summands
    max_family_ratio: float = 0.75  # most of one family that may go; one group always stays
    round_to: int = 1  # kept counts are multiples of this
    keep: tuple[str | nn.Module, ...] = ()  # modules, or name patterns, that stay dense
    only: tuple[str | nn.Module, ...] = ()  # where given, no other layer loses outputs
    kinds: tuple[str, ...] = DEFAULT_KINDS  # of "head", "head_dim", "width", "channel", "neuron"
    outputs: tuple[str, ...] | None = None  # outputs that keep their shape; None: all
    forward: Callable[..., Any] | None = None  # traced with the model instead of its own forward pass
    normalize: str = "none"  # what ranks together: see `ranking.Ranking`
    uniform: bool = False  # whether families of one kind and size keep equally many groups
    criterion: Criterion = "l2"  # Eq. 2, another of `criteria.NAMES`, or a function
    include_bias: bool = False  # whether biases count in saliency and penalty

    # Stability, Eq. 3-6.
    lag: int = 2  # i of Eq. 3, checks
    window: int = 3  # r of Eq. 4 and 5, checks
    tau: float = 1e-4  # Eq. 5
    epsilon: float = 1e-3  # Eq. 6
    sparsify_from: int | None = None  # check at which sparsity learning starts; None: Eq. 5
    max_residual: float | None = 0.05  # cut once pruned / kept saliency is below; None: at once
    deadline: float | int | None = 0.6  # cut here at the latest: a share (float) or a check (int)

    # Penalty, Eq. 7-9.
    penalty: str = "both"  # "lasso": Eq. 8 alone; "shrink": Eq. 9 alone
    strength: str = "auto"  # "paper": lambda0, delta, delta_every, growth, whatever they add up to
    nats: float = 3.0  # "auto": sum of lambda * lr over the planned stage
    span: float = 0.2  # "auto": the planned stage's share of the run
    shape: str = "linear"  # "auto": growth of lambda * lr over the stage
    lambda0: float = 1e-4
    delta: float = 1e-4
    delta_every: int = 1  # checks
    growth: str = "linear"  # "recursive": Eq. 7 as printed

    # The run.
    total_steps: int | None = None  # optimizer steps of the whole run; None: ask the scheduler
    epochs: int | None = None  # of the whole run, from its first; `step` is called once in each
    check_every: int | str = "auto"  # optimizer steps between checks; "auto": see `Pruner.step`
    capturable: bool = False  # whether optimizer steps are captured in a CUDA graph
    again: bool = False  # cut a model further that was cut before; the ratio is of the dense one

    # Grouping.
    grouping: str = "labels"
    verify: bool = True  # prove the groups on a copy of the model
    time_limit: float = 300.0  # seconds that finding and proving the groups may take

    def __post_init__(self) -> None:
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
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(map(str, choices))
                raise ConfigError(f"{name}={getattr(self, name)!r} is not known: use one of {known}")
        _check_target(self.target)
        if not callable(self.criterion) and self.criterion not in criteria.NAMES:
            raise ConfigError(
                f"criterion={self.criterion!r} is not known: use one of {', '.join(criteria.NAMES)}, or "
                "a function of a weight, its gradient and its optimizer state"
            )
        for name in ("round_to", "lag", "window", "delta_every"):
            _check_integer(name, getattr(self, name), 1)
        for name in ("tau", "epsilon", "nats", "lambda0", "delta"):
            _check_number(name, getattr(self, name), "at least 0", lambda x: x >= 0)
        _check_number("max_family_ratio", self.max_family_ratio, "in (0, 1]", lambda x: 0 < x <= 1)
        _check_number("time_limit", self.time_limit, "above 0", lambda x: x > 0)
        _check_number("span", self.span, "in (0, 1)", lambda x: 0 < x < 1)
        if self.max_residual is not None:
            _check_number("max_residual", self.max_residual, "above 0, or None", lambda x: x > 0)
        for name in ("sparsify_from", "total_steps", "epochs"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 1)
        if self.total_steps is not None and self.epochs is not None:
            raise ConfigError(
                f"total_steps={self.total_steps} and epochs={self.epochs} both say how long the run is: "
                "give one of them"
            )
        if isinstance(self.deadline, float):
            _check_number(
                "deadline",
                self.deadline,
                "a share in (0, 1] (a whole number is a check, e.g. 50)",
                lambda x: 0 < x <= 1,
            )
        elif self.deadline is not None:
            _check_integer("deadline", self.deadline, 1)
        if self.check_every != "auto":
            _check_integer("check_every", self.check_every, 1, "'auto' or an integer")

    def plain(self) -> dict[str, Any]:
        """The fields that numbers and words say, as such: what a saved run is compared by."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("verify", "time_limit", "capturable"):  # they do not change what is found
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
        script's `sl_end_epoch`; no residual is asked for. Any field may be overridden.

        Raises:
            ConfigError: another name, or an unknown field.
        """
        if data not in ("cifar", "imagenet"):
            raise ConfigError(f"Config.paper({data!r}): use 'cifar' or 'imagenet'")
        preset: dict[str, Any] = {
            "strength": "paper",
            "growth": "linear",
            "lambda0": 1e-4,
            "delta": 1e-4,
            "delta_every": 1 if data == "cifar" else 2,
            "tau": 1e-4,
            "epsilon": 1e-3,
            "sparsify_from": 30 if data == "cifar" else None,
            "deadline": 110 if data == "cifar" else 50,
            "max_residual": None,
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


def checked_ratio(ratio: float) -> float:
    """`ratio` as a float strictly between 0 and 1: the share of the target that is removed.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, Real):
        raise ConfigError(f"ratio={ratio!r}: a number between 0 and 1 is expected")
    if 0 < ratio < 1:
        return float(ratio)
    if math.isnan(ratio):
        raise ConfigError("ratio is NaN: it is the share of the target to remove, between 0 and 1")
    if 1 < ratio < 2:
        hint = f" (did you mean {float(Fraction(str(ratio)) - 1):g}?)"
    elif 2 <= ratio < 100:
        hint = f" (did you mean {ratio / 100:g}?)"
    else:
        hint = ""
    raise ConfigError(
        f"ratio={ratio:g} must lie between 0 and 1, both excluded: "
        f"it is the share of the target that is removed{hint}"
    )


def budget_of(dense_cost: int, ratio: float) -> int:
    """Largest cost that still removes `ratio`: floor((1 - ratio) * dense_cost), ratio taken as written.

    A binary 0.7 is a little less than 7/10; the decimal that the user wrote is what counts (Eq. 1).
    """
    return math.floor((1 - Fraction(repr(ratio))) * dense_cost)


def _check_target(target: object) -> None:
    if callable(target) or (isinstance(target, str) and target in TARGETS):
        return
    if isinstance(target, Mapping) and target:
        for name, share in target.items():
            if name not in TARGETS:
                raise ConfigError(f"target={target!r}: {name!r} is not one of {', '.join(TARGETS)}")
            _check_number(f"target[{name!r}]", share, "above 0", lambda x: x > 0)
        return
    raise ConfigError(
        f"target={target!r} is not known: use one of {', '.join(TARGETS)}, their weights as in "
        "{'flops': 2, 'params': 1}, or a callable that turns Families into a sequence of Product"
    )


def _check_integer(name: str, value: object, least: int, wanted: str = "an integer") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}: {wanted} of at least {least} is expected")


def _check_number(name: str, value: object, wanted: str, test: Callable[[float], bool]) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not test(value):  # type: ignore[arg-type]
        raise ConfigError(f"{name}={value!r}: it must be {wanted}")
