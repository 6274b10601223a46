"""The proof: cutting groups out equals zeroing their slices, in float64, on random weights.

The reference is the exported graph (or, where there is none, the module) with every slice of the
pruned groups zeroed; the subject is a copy of the user's own module, cut. Random weights, norm
scales and statistics make each index distinguishable from its neighbours, so that a label on the
wrong index cannot hide.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ocsfast.core.errors import GroupingError, OcsfastError
from ocsfast.core.families import Families, kept_indices
from ocsfast.cut.removal import remove_groups
from ocsfast.grouping.deadline import Deadline
from ocsfast.grouping.proof.copying import copied
from ocsfast.grouping.proof.double import GROUPED_MM, Double, Settled, bent, doubled, grouped_mm
from ocsfast.grouping.propagate import arguments, operator_name
from ocsfast.grouping.trace.export import Trace, changes_modes, undisturbed

logger = logging.getLogger("ocsfast")

SHARE = 0.3  # of every family's groups are cut in a trial
TOLERANCE = 1e-8  # relative to the largest output; rounding in float64 stays below 1e-11
NOISE = 1e-14  # relative, in the weights: some ten times what float64 rounds away
SEED = 0
CUT_FAILS = "cutting it fails"  # how the reason begins where a cut model does not compute what it should


@dataclass(frozen=True, eq=False)
class Run:
    """One mode that a cut model is tried in, against the whole model's graph."""

    graph: Trace
    training: bool
    outputs: Collection[int] | None = None  # numbers of the outputs that must agree; None: all


@dataclass(frozen=True, eq=False)
class Setting:
    """What a model is tried on."""

    args: tuple[Any, ...]  # the input that the graphs were traced with
    kwargs: dict[str, Any]
    runs: tuple[Run, ...]  # none: the module in evaluation is held against itself
    training: bool  # whether the cut copy must run in training mode too, whatever it computes there
    deadline: Deadline | None = None


def proved(model: nn.Module, families: Families, setting: Setting) -> Families:
    """The families that stood the trial; those that did not are left dense, and named.

    Raises:
        GroupingError: the model cannot be copied, or families fail together that stand alone.
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
    """The families that fail, found by halving: one trial where all is well.

    Families of the same layers in repeated blocks are tried together: they stand or fall alike.
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
    """A float64 copy of a model with random weights, on which cuts are tried."""

    def __init__(self, model: nn.Module, families: Families, setting: Setting) -> None:
        self.setting = setting
        self.families = families
        self._models = {False: self._prepared(model, training=False)}
        if changes_modes(model) and any(run.training for run in setting.runs):
            self._models[True] = self._prepared(model, training=True)
        self.inputs = pytree.tree_map(_random_input, (setting.args, setting.kwargs))
        for prepared in self._models.values():
            calibrate(prepared, *self.inputs)

    def _prepared(self, model: nn.Module, training: bool) -> nn.Module:
        """A float64 copy with random weights, in a mode first: its code may change weights there."""
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
        """Cut some groups of these families, one at least in each: None if it equals zeroing them."""
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
        if len(actual) != len(expected):
            return "another number of outputs"
        for a, b in zip(actual, expected, strict=True):
            if a.shape != b.shape:
                return f"an output of shape {tuple(a.shape)} instead of {tuple(b.shape)}"
            apart = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
            scale = float(b.double().abs().max()) if b.numel() else 0.0
            if apart <= TOLERANCE * scale:
                continue
            if not apart <= self._drift(pruned, expected, run) * scale:
                return f"outputs up to {scale:.3g} differ by {apart:.3g}"
        return None

    def _drift(self, pruned: Tensor, expected: list[Tensor], run: Run | None) -> float:
        """What rounding may do to the outputs, relative: some deep models multiply it by 10**10.

        Found by a little noise in the weights; where that is too much to tell right from wrong, nothing.
        """
        noisy = self._zeroed(pruned, run, NOISE)
        pairs = [(a, b) for a, b in zip(noisy, expected, strict=True) if b.numel()]
        far = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) for a, b in pairs)
        return far if far < 1e-3 else 0.0

    def _zeroed(self, pruned: Tensor, run: Run | None = None, noise: float = 0.0) -> list[Tensor]:
        """The outputs of the whole model, every slice of the pruned groups zero."""
        model = self._model(run)
        state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        state.update(model.named_buffers(remove_duplicate=False))
        copies: dict[int, Tensor] = {}  # of each tensor, whatever its names
        for axis in self.families.axes:
            tensor = state[axis.tensor]
            zeroed = copies.setdefault(id(tensor), tensor.detach().clone())
            zeroed.index_fill_(axis.axis, _gone(axis.groups, pruned).to(tensor.device), 0.0)
        for tensor in {id(t): t for t in model.buffers()}.values():
            if run is not None and run.training:  # which changes statistics and counts in place
                copies.setdefault(id(tensor), tensor.detach().clone())
        if noise:
            for tensor in {id(t): t for t in state.values() if t.is_floating_point()}.values():
                kept = copies.get(id(tensor), tensor)
                copies[id(tensor)] = kept * (1 + noise * torch.randn_like(kept))
        state = {name: copies.get(id(tensor), tensor) for name, tensor in state.items()}
        if run is None:
            args, kwargs = self.inputs
            with Double():
                return self._outputs(functional_call(model, state, args, kwargs), None)
        reference = _Reference(run, self.families, pruned)
        try:
            with Double(), Settled():  # type: ignore[no-untyped-call]
                out = run.graph.run(reference, state, self.inputs)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise GroupingError(
                f"the traced graph does not run in float64 ({type(error).__name__}: {first}); "
                "pass verify=False to go without the proof"
            ) from error
        return self._outputs(out[: len(run.graph.outputs)], run)

    def _cut(self, pruned: Tensor, run: Run | None = None) -> list[Tensor]:
        subject = copied(self._model(run))
        remove_groups(subject, self.families, pruned)
        args, kwargs = self.inputs
        with Double(), Settled():  # type: ignore[no-untyped-call]
            if run is not None and run.training and True not in self._models:
                subject.train()
            out = self._outputs(subject(*args, **kwargs), run)
            if self.setting.training and not any(run.training for run in self.setting.runs):
                subject.train()(*args, **kwargs)  # its shapes have to fit
        return out

    def _outputs(self, output: Any, run: Run | None) -> list[Tensor]:
        """The tensors that must agree, in order, whatever holds them."""
        wanted = None if run is None else run.outputs
        leaves = enumerate(pytree.tree_leaves(output))
        tensors = [x for n, x in leaves if isinstance(x, Tensor) and (wanted is None or n in wanted)]
        if any(isinstance(x, FakeTensor) for x in tensors):
            raise GroupingError(
                "the model's code keeps tensors of an earlier trace, which hold no data, where ocsfast "
                "does not find them: clear its cache, or pass the cache in the model's attributes"
            )
        return tensors


class _Reference(torch.fx.Interpreter):
    """Runs the uncut graph; averages run over the kept indices, a norm's affine part over all."""

    def __init__(self, run: Run, families: Families, pruned: Tensor) -> None:
        super().__init__(run.graph.graph)
        self._kept: dict[str, dict[int, Tensor]] = {}
        for s in families.statistics:
            if s.training == run.training:
                self._kept.setdefault(s.node, {})[s.dim] = kept_indices(s.groups, pruned)

    def run_node(self, n: torch.fx.Node) -> Any:
        name = operator_name(n.target) if n.op == "call_function" else ""
        if name == "_assert_tensor_metadata":
            return None  # the trace's dtype, which this run replaces
        kept = self._kept.get(n.name)
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = doubled(self.fetch_args_kwargs_from_env(n))
        if name in GROUPED_MM:
            return grouped_mm(*args, **kwargs)
        if name == "relu":
            return bent(args[0], in_place=str(n.target).startswith("aten.relu_"))
        if name == "_weight_norm":  # a row without weights has no direction: 0 / 0
            return torch.nan_to_num(self.call_function(n.target, args, kwargs))
        if kept is None:
            return self.call_function(n.target, args, kwargs)
        if name in ("layer_norm", "group_norm", "rms_norm", "batch_norm"):
            given = arguments(n)
            given.update(zip(given, args, strict=False))
            given.update(kwargs)
            return _norm_over(name, given, *kept.values())
        part = args[0]
        for dim, indices in kept.items():
            part = part.index_select(dim, indices.to(part.device))
        return self.call_function(n.target, (part, *args[1:]), kwargs)


def _norm_over(name: str, given: dict[str, Any], kept: Tensor) -> Tensor:
    """The norm with its statistics over `kept` alone; zero elsewhere, before the affine part."""
    x, weight, bias = given["input"], given.get("weight"), given.get("bias")
    dim = 1 if name == "group_norm" else -1
    kept = kept.to(x.device)
    part = x.index_select(dim, kept)
    if name == "batch_norm":  # of a weight's rows, each over the inputs that are left
        part = F.batch_norm(part, None, None, training=True, eps=given["eps"])
    elif name == "group_norm":
        part = F.group_norm(part, 1, eps=given["eps"])
    elif name == "layer_norm":
        part = F.layer_norm(part, (len(kept),), eps=given["eps"])
    else:
        part = F.rms_norm(part, (len(kept),), eps=given["eps"])
    out = torch.zeros_like(x).index_copy_(dim, kept, part)
    shape = (-1, *[1] * (x.dim() - 2)) if name in ("group_norm", "batch_norm") else (-1,)
    if weight is not None:
        out = out * weight.view(shape)
    return out if bias is None else out + bias.view(shape)


def _gone(labels: Tensor, pruned: Tensor) -> Tensor:
    gone = torch.cat([pruned, torch.tensor([False])])  # label -1 reads the last entry
    return torch.nonzero(gone[labels]).flatten()


def _random_input(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return torch.randn_like(x, dtype=torch.float64)
    return x


def calibrate(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Batch norms get the statistics of what flows into them.

    With any others activations grow from layer to layer, and gates amplify the rounding to a difference.
    A copy runs, so that what its pass writes elsewhere stays there.
    """
    taught = copied(model)
    norms: list[tuple[Any, Any]] = [
        (norm, twin)
        for norm, twin in zip(model.modules(), taught.modules(), strict=True)
        if isinstance(getattr(norm, "running_var", None), Tensor) and hasattr(norm, "momentum")
    ]
    if not norms:
        return
    for _, twin in norms:
        twin.train()
        twin.momentum = 1.0
    try:
        with Double():
            taught(*args, **kwargs)
    except Exception as error:  # too few values for a variance, say: then with those it has
        logger.debug("batch norms keep their statistics: %s", error)
    for norm, twin in norms:
        norm.running_mean.copy_(twin.running_mean)
        norm.running_var.copy_(twin.running_var.clamp(min=0.1))


def randomize(model: nn.Module) -> None:
    """Weights of unit gain, norm scales around one, statistics that differ from index to index."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() > 1:
            fan_in = max(1, parameter.numel() // max(1, parameter.shape[0]))
            parameter.copy_(noise * (2 / fan_in) ** 0.5)
        else:
            parameter.add_(0.3 * noise)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            positive = bool((buffer > 0).all())
            buffer.mul_(torch.rand_like(buffer) + 0.5)
            if not positive:
                buffer.add_(0.3 * torch.randn_like(buffer))
