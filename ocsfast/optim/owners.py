"""Optimizers: which one owns a model, whether its state can be cut, and cutting it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn, optim
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ocsfast.core.errors import ConfigError, StateError
from ocsfast.core.families import Families
from ocsfast.cut.optimizer_state import unsliceable
from ocsfast.optim.adamw import AdamW
from ocsfast.optim.sgd import SGD

# Their state can be cut, which is known before their first step.
TORCHS = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop, optim.NAdam, optim.Adagrad, optim.RAdam),
    *(optim.Adamax, optim.Adadelta, optim.Adafactor, optim.ASGD, optim.Rprop),
)
SUPPORTED = (SGD, AdamW, *TORCHS)


class StepCounter:
    """Counts the steps of every optimizer in the process, so that one can be found by its parameters.

    A step hook is the only way to learn of an optimizer that nobody passes; the count is weak and
    costs about a microsecond a step.
    """

    def __init__(self) -> None:
        self._steps: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._last: weakref.ref[Optimizer] | None = None

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        self._last = weakref.ref(optimizer)

    def last(self) -> Optimizer | None:
        """The optimizer that stepped last, if it is still alive."""
        return None if self._last is None else self._last()

    def steps(self, optimizer: Optimizer) -> int:
        """Steps of `optimizer` since ocsfast was imported."""
        return self._steps.get(optimizer, 0)

    def owners(self, parameters: Mapping[str, nn.Parameter]) -> list[Optimizer]:
        """The optimizers that have stepped and own at least one of `parameters`."""
        wanted = {id(p) for p in parameters.values()}
        return [o for o in list(self._steps) if wanted & {id(p) for p in owned(o)}]


# The process's own. A hook on every optimizer's step is the only way to find one that nobody passes.
counter = StepCounter()
register_optimizer_step_post_hook(counter)


def owned(optimizer: Optimizer) -> list[nn.Parameter]:
    """Every parameter in the optimizer's param groups."""
    return [p for param_group in optimizer.param_groups for p in param_group["params"]]


def find_optimizer(counter: StepCounter, trainable: Mapping[str, nn.Parameter]) -> Optimizer:
    """The one optimizer that owns the model's trainable parameters.

    Raises:
        StateError: none has stepped, none owns them, or more than one does.
    """
    owners = counter.owners(trainable)
    if not owners:
        raise StateError(
            "no optimizer step has been seen on this model's parameters: call ocsfast.step after the "
            "training steps, import ocsfast before them, or pass optimizer="
        )
    if len(owners) > 1:
        raise StateError(_several(owners, trainable))
    return owners[0]


def _several(owners: Sequence[Optimizer], trainable: Mapping[str, nn.Parameter]) -> str:
    """Why several optimizers are too many, and what to do."""
    parts = [_names_in(o, trainable) for o in owners]
    kinds = ", ".join(type(o).__name__ for o in owners)
    begins = f"{len(owners)} optimizers own parameters of this model ({kinds})"
    if sum(map(len, parts)) > len(set().union(*parts)):
        return (
            f"{begins}, and some of them the same ones, so one is probably out of use: pass optimizer= "
            "with the one that trains the model, or delete the other"
        )
    _, *rest = sorted(parts, key=len, reverse=True)
    others = [name for part in rest for name in part]
    last = "Where they share layers, as Muon matrices and AdamW biases and norms, only the first helps"
    apart = _modules_of(parts)
    if apart:
        calls = " and ".join(f"ocsfast.step(model.{name}, ...)" for name in sorted(apart))
        last = f"Or prune each as a model of its own, as a generator and a discriminator: {calls}"
    return (
        f"{begins}, each a part: this version goes by one. Make one optimizer of several param groups. "
        "Or, if the layers of all others may stay dense, pass optimizer= with the one, keep= with what "
        f"the others own (keep={_few(others)}), and also= with any that holds state of what is cut. "
        f"{last}"
    )


def _names_in(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    mine = {id(p) for p in owned(optimizer)}
    return [name for name, p in parameters.items() if id(p) in mine]


def _modules_of(parts: Sequence[Sequence[str]]) -> list[str]:
    """The module in which each part lies, if no two parts lie in one; else none."""
    modules = []
    for names in parts:
        paths = [name.split(".")[:-1] for name in names]
        steps = itertools.takewhile(lambda step: len(set(step)) == 1, zip(*paths, strict=False))
        modules.append(".".join(step for step, *_ in steps))
    apart = all(not f"{a}.".startswith(f"{b}.") for a, b in itertools.permutations(modules, 2))
    return modules if apart and all(modules) else []


def _few(names: Sequence[str]) -> str:
    """A list of names as one would write it, three at most."""
    return f"[{', '.join([*map(repr, names[:3]), *(['...'] if len(names) > 3 else [])])}]"


def require_optimizer(optimizer: Optimizer) -> Optimizer:
    """What was passed as one, if it is one.

    Raises:
        ConfigError: it is not, as a scheduler or a framework's wrapper.
    """
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"optimizer={type(optimizer).__name__}: one torch.optim.Optimizer is expected; of "
            "several, one with all of their param groups"
        )
    return optimizer


def tells_by_steps(optimizer: Optimizer) -> bool:
    """Whether it takes a first step to tell if its state can be cut."""
    return type(optimizer) not in SUPPORTED and not optimizer.state


def check_owner(
    optimizer: Optimizer, families: Families, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Refuse an optimizer that does not own every parameter that may be pruned.

    Raises:
        StateError: naming those it does not own, who does if that is known, and what to do.
    """
    mine = {id(p) for p in owned(optimizer)}
    coupled = {a.tensor: parameters[a.tensor] for a in families.axes if a.tensor in parameters}
    missing = {name: p for name, p in coupled.items() if id(p) not in mine}
    if not missing:
        return
    # A family stays prunable under keep= if none of its groups lives in what is kept.
    touched = [axis.groups for axis in families.axes if axis.tensor in missing]
    members = families.family_of_groups()
    left = len(families.families) - len({f for g in touched for f in members[g[g >= 0]].tolist()})
    others = [o for o in counter.owners(missing) if o is not optimizer]
    known = " and ".join(f"the {type(o).__name__} optimizer does" for o in others)
    first, name = next(iter(missing)), type(optimizer).__name__
    more, it = (f" and {len(missing) - 1} more are", "them") if len(missing) > 1 else (" is", "it")
    advice = "Add what is missing to it, as a param group"
    if others:
        advice = "Make one optimizer of several param groups"
    if left:
        also = ", and also= with the other if it holds state of what is cut" if others else ""
        advice += f", or leave their layers dense: keep={_few(list(missing))}{also}"
    elif others:
        advice += ": every layer to be pruned has parameters in both, so keep= would leave none"
    raise StateError(
        f"{first}{more} to be pruned, but the {name} optimizer does not own {it}"
        f"{': ' + known if known else ''}. This version goes by one optimizer. {advice}"
    )


def check_supported(optimizer: Optimizer, stepped: bool) -> None:
    """Refuse an optimizer whose state could not be cut with its parameters.

    Args:
        stepped: whether it has taken a step, so that its state can be judged.

    Raises:
        StateError: naming the optimizer and what in its state cannot be sliced.
    """
    name = type(optimizer).__name__
    known = ", ".join(kind.__name__ for kind in TORCHS)
    if type(optimizer) in SUPPORTED and not optimizer.state:
        return
    if name == "ZeroRedundancyOptimizer":
        raise StateError(
            "a ZeroRedundancyOptimizer cannot be cut: it keeps parts of its state on other ranks. Use "
            "the optimizer inside it on every rank"
        )
    if not stepped and tells_by_steps(optimizer):
        raise StateError(
            f"optimizer {name} is not one of {known}, and before its first step nothing tells whether "
            "its state can be cut. Attach after the first training step"
        )
    what = unsliceable(optimizer)
    if what is not None:
        raise StateError(
            f"optimizer {name} cannot be cut: {what}. Use one of {known}, or say how with "
            "ocsfast.register_slicer"
        )
