"""Trials: cutting groups out must equal zeroing their slices, in float64, on random weights.

The reference is the traced graph (or, where there is none, the module) with every slice of the pruned
groups set to zero. It is compared with a copy of the user's own module from which the groups were cut.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ocsfast.core.errors import GroupingError, OcsfastError
from ocsfast.core.families import Families
from ocsfast.cut.removal import remove_groups
from ocsfast.grouping.proof.arithmetic import Double, Settled
from ocsfast.grouping.proof.copies import copied
from ocsfast.grouping.proof.reference import Reference
from ocsfast.grouping.proof.weights import calibrate, random_input, randomize
from ocsfast.grouping.time_limit import TimeLimit
from ocsfast.grouping.trace.batch import BATCH
from ocsfast.grouping.trace.export import Trace
from ocsfast.grouping.trace.side_effects import changes_modes, own_inputs, undisturbed

logger = logging.getLogger("ocsfast")

SHARE = 0.3  # of every family's groups are cut in a trial
TOLERANCE = 1e-8  # relative to the largest output; rounding in float64 stays below 1e-11
NOISE = 1e-14  # relative, in the weights: some ten times what float64 rounds away
MOST_DRIFT = (
    1e-3  # relative: where noise moves the outputs further, a trial could not tell right from wrong
)
SEED = 0
CUT_FAILS = "cutting it fails"  # how the reason begins where a cut model computes something else


@dataclass(frozen=True, eq=False)
class Run:
    """One mode in which a cut model is compared with the whole model's graph."""

    graph: Trace
    training: bool
    outputs: Collection[int] | None = None  # numbers of the outputs that must agree; None: all


@dataclass(frozen=True, eq=False)
class Setting:
    """What a model is tried on."""

    args: tuple[Any, ...]  # the input that the graphs were traced with
    kwargs: dict[str, Any]
    runs: tuple[Run, ...]  # where empty, the module in evaluation is its own reference
    training: bool  # whether the cut copy must also run in training mode, whatever it computes there
    deadline: TimeLimit | None = None
    as_given: bool = False  # whether the input is the user's own, and not a few samples of it


class GraphFails(GroupingError):
    """The traced graph does not run on numbers.

    Attributes:
        why: the cause.
    """

    def __init__(self, why: str) -> None:
        super().__init__(f"{why}; pass verify=False to go without the proof")
        self.why = why


def proved(model: nn.Module, families: Families, setting: Setting) -> Families:
    """The families that passed the trial. Those that failed are left dense, and named.

    Raises:
        GroupingError: the model cannot be copied, or families fail together that pass alone.
    """
    if not families.families:
        return families
    with undisturbed(model, training=False), torch.no_grad():
        torch.manual_seed(SEED)
        trial = Trial(model, families, setting)
        failed = _failing(trial, range(len(families.families)))
        if not failed:
            return families
        names = ", ".join(families.families[f].name for f in failed)
        logger.warning("%s: cutting is not the same as zeroing, so it stays dense", names)
        left = families.without({f: f"{CUT_FAILS}: {why}" for f, why in failed.items()})
        if left.families:
            again = Trial(model, left, setting)
            why = again.difference(range(len(left.families)))
            if why:
                raise GroupingError(
                    f"the model cannot be cut: {why}. Name layers in keep=, or lower the ratio"
                )
        return left


def _failing(trial: Trial, members: Sequence[int]) -> dict[int, str]:
    """The families that fail, found by halving, and why: a single trial where all pass.

    Families of the same layer in repeated blocks are never divided, since they pass or fail alike.
    """
    why = trial.difference(members)
    if why is None:
        return {}
    families = trial.families.families
    alike: dict[str, list[int]] = {}
    for f in members:
        alike.setdefault(f"{families[f].kind} {re.sub('[0-9]+', '*', families[f].name)}", []).append(f)
    if len(alike) == 1:
        return dict.fromkeys(members, why)
    parts = list(alike.values())
    half = len(parts) // 2
    return {
        **_failing(trial, [f for part in parts[:half] for f in part]),
        **_failing(trial, [f for part in parts[half:] for f in part]),
    }


class Trial:
    """Float64 copies of a model with random weights, on which cuts are tried."""

    def __init__(self, model: nn.Module, families: Families, setting: Setting) -> None:
        self.setting = setting
        self.families = families
        floating = (p.dtype for p in model.parameters() if p.is_floating_point())
        self._traced = next(floating, torch.float32)
        self._models = {False: self._prepared(model, training=False)}
        if changes_modes(model) and any(run.training for run in setting.runs):
            self._models[True] = self._prepared(model, training=True)
        self.inputs = pytree.tree_map(random_input, (setting.args, setting.kwargs))
        self._samples = setting.runs[0].graph.samples if setting.runs else BATCH
        with self._arithmetic():
            for prepared in self._models.values():
                calibrate(prepared, *own_inputs(*self.inputs))

    def _prepared(self, model: nn.Module, training: bool) -> nn.Module:
        """A float64 copy with random weights.

        It is put in its mode before the weights are drawn, because setting the mode may change them.
        """
        try:
            prepared = copied(model, double=True).train(training)
        except Exception as error:
            raise GroupingError(
                f"the model cannot be copied for the proof ({type(error).__name__}: {error}); "
                "pass verify=False to go without it"
            ) from error
        randomize(prepared)
        return prepared

    def _model(self, run: Run | None) -> nn.Module:
        return self._models.get(run is not None and run.training, self._models[False])

    def difference(self, members: Sequence[int]) -> str | None:
        """Cut SHARE of the groups of each of these families; None if that equals zeroing them.

        At least one group of each family is cut, and at least one stays. Otherwise the difference is
        told in a few words.

        Raises:
            GroupingTimeout: the setting's deadline is over.
            GraphFails: the reference cannot be run.
        """
        if self.setting.deadline is not None:
            self.setting.deadline.check(f"at the proof of {self.families.families[members[0]].name}")
        pruned = torch.zeros(self.families.num_groups, dtype=torch.bool)
        for f in members:
            family = self.families.families[f]
            count = min(family.size - 1, max(1, round(SHARE * family.size)))
            pruned[family.first + torch.randperm(family.size)[:count]] = True
        for run in self.setting.runs or (None,):
            expected = self._zeroed(pruned, run)
            try:
                actual = self._cut(pruned, run)
            except OcsfastError:
                raise
            except Exception as error:  # whatever the module's own code raises on an unexpected width
                return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            why = self._apart(actual, expected, pruned, run)
            if why is not None:
                return why + " in training" * (run is not None and run.training)
        return None

    def _apart(
        self, actual: list[Tensor], expected: list[Tensor], pruned: Tensor, run: Run | None
    ) -> str | None:
        """How two lists of outputs differ by more than rounding; None if they do not."""
        if len(actual) != len(expected):
            return "another number of outputs"
        for a, b in zip(actual, expected, strict=True):
            if a.shape != b.shape:
                return f"an output of shape {tuple(a.shape)} instead of {tuple(b.shape)}"
            a, b = a.double(), b.double()
            finite = b.isfinite()
            if not b.numel() or (bool((a == b).all())):
                continue
            if not bool(finite.any()):
                return "an output holds no finite number on random weights and inputs"
            # Masks hold infinity. NaN is no number, but it has to stand in the same places.
            if not torch.equal(
                a.nan_to_num(0.0)[~finite], b.nan_to_num(0.0)[~finite]
            ) or not torch.equal(finite, a.isfinite()):
                return "numbers that are not finite stand in other places"
            apart, scale = float((a - b)[finite].abs().max()), float(b[finite].abs().max())
            if apart <= TOLERANCE * scale:
                continue
            if not apart <= self._drift(pruned, expected, run) * scale:
                return f"outputs up to {scale:.3g} differ by {apart:.3g}"
        return None

    def _drift(self, pruned: Tensor, expected: list[Tensor], run: Run | None) -> float:
        """How far rounding may move outputs, relative to them: deep models multiply it by up to 1e10.

        It is measured by NOISE in the weights. Beyond MOST_DRIFT it is 0, so that the trial fails.
        """
        far = 0.0
        for a, b in zip(self._zeroed(pruned, run, NOISE), expected, strict=True):
            both = a.isfinite() & b.isfinite()
            if bool(both.any()):
                apart = (a - b)[both].abs().max() / b[both].abs().max().clamp(min=1e-300)
                far = max(far, float(apart))
        return far if far < MOST_DRIFT else 0.0

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """What a cut model and the whole one are both run in."""
        with Double(self._traced), Settled(self._samples):
            yield

    def _zeroed(self, pruned: Tensor, run: Run | None = None, noise: float = 0.0) -> list[Tensor]:
        """The outputs of the whole model, every slice of the pruned groups being zero."""
        state = self._zeroed_state(pruned, run, noise)
        if run is None:
            args, kwargs = own_inputs(*self.inputs)
            with self._arithmetic():
                return self._outputs(functional_call(self._model(run), state, args, kwargs), None)
        reference = Reference(run.graph, run.training, self.families, pruned)
        try:
            with self._arithmetic():
                out = run.graph.run(reference, state, own_inputs(*self.inputs))
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise GraphFails(
                f"the traced graph does not run in float64 ({type(error).__name__}: {first})"
            ) from error
        return self._outputs(out[: len(run.graph.outputs)], run)

    def _zeroed_state(self, pruned: Tensor, run: Run | None, noise: float) -> dict[str, Tensor]:
        """Parameters and buffers by all their names, the pruned slices zero, with relative noise."""
        model = self._model(run)
        state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        state.update(model.named_buffers(remove_duplicate=False))
        copies: dict[int, Tensor] = {}  # by the id of a tensor, which may have several names
        for axis in self.families.axes:
            tensor = state[axis.tensor]
            zeroed = copies.setdefault(id(tensor), tensor.detach().clone())
            zeroed.index_fill_(axis.axis, _pruned_indices(axis.groups, pruned).to(tensor.device), 0.0)
        for tensor in {id(t): t for t in model.buffers()}.values():
            if run is not None and run.training:  # the run changes statistics and counts in place
                copies.setdefault(id(tensor), tensor.detach().clone())
        if noise:
            for tensor in {id(t): t for t in state.values() if t.is_floating_point()}.values():
                kept = copies.get(id(tensor), tensor)
                copies[id(tensor)] = kept * (1 + noise * torch.randn_like(kept))
        return {name: copies.get(id(tensor), tensor) for name, tensor in state.items()}

    def _cut(self, pruned: Tensor, run: Run | None = None) -> list[Tensor]:
        """The outputs of a copy of the module from which the groups were cut."""
        subject = copied(self._model(run))
        remove_groups(subject, self.families, pruned)
        with self._arithmetic():
            if run is not None and run.training and True not in self._models:
                subject.train()
            args, kwargs = own_inputs(*self.inputs)
            out = self._outputs(subject(*args, **kwargs), run)
            if self.setting.training and not any(run.training for run in self.setting.runs):
                args, kwargs = own_inputs(*self.inputs)
                subject.train()(*args, **kwargs)  # its shapes have to fit
        return out

    def _outputs(self, output: Any, run: Run | None) -> list[Tensor]:
        """The tensors that must agree, in order, out of whatever structure holds them."""
        wanted = None if run is None else run.outputs
        leaves = enumerate(pytree.tree_leaves(output))
        tensors = [x for n, x in leaves if isinstance(x, Tensor) and (wanted is None or n in wanted)]
        if any(isinstance(x, FakeTensor) for x in tensors):
            raise GroupingError(
                "the model's code keeps tensors of an earlier trace, which hold no data, where ocsfast "
                "does not find them: clear its cache, or pass the cache in the model's attributes"
            )
        return tensors


def _pruned_indices(labels: Tensor, pruned: Tensor) -> Tensor:
    """Positions along a labelled dimension that go: 1-d int64, ascending."""
    gone = torch.cat([pruned, torch.tensor([False])])  # label -1 reads the last entry
    return torch.nonzero(gone[labels]).flatten()
