"""The state machine: observe, sparsify, pruned (Algorithm 1), driven by the optimizer's own steps."""

from __future__ import annotations

import logging
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ocsfast.choice import stability
from ocsfast.choice.freezing import Freezing
from ocsfast.choice.selection import (
    Choice,
    choose,
    coarsest,
    make_aim,
    mean_pruned_norm,
    overshoot,
    require_reachable,
)
from ocsfast.core.config import LENGTHS, Config, checked_ratio
from ocsfast.core.errors import StateError
from ocsfast.core.families import NOT_USED, Families
from ocsfast.cut.copies import Also, Copies
from ocsfast.cut.fitting import FitHook, surplus
from ocsfast.cut.record import record_of
from ocsfast.cut.removal import cutting, require_between_steps
from ocsfast.cut.sizes import followed_sizes, stale_sizes
from ocsfast.distributed.placement import processes_of
from ocsfast.ops import capture
from ocsfast.ops.cost import make_record
from ocsfast.optim import OnePass, penalty
from ocsfast.optim import strength as schedule
from ocsfast.optim.owners import (
    Scalar,
    check_owner,
    check_supported,
    followed_by,
    overflowed,
    stands_still,
    weak_hook,
)
from ocsfast.run import history, messages
from ocsfast.run.clock import Clock
from ocsfast.run.history import Progress, StepReport, told
from ocsfast.run.timetable import Timetable, require_apart
from ocsfast.run.uncut import Watch, warn_at_end

logger = logging.getLogger("ocsfast")

MUCH = 0.02  # of the dense cost: a cut that takes so much more than asked for is worth a warning


class Pruner:
    """Watches a model, shrinks what will go, and cuts it out; made by `ocsfast.attach`.

    Attributes:
        config, ratio, optimizer: as given.
        families: the structure at attach, which numbers the groups of `scores` and `mask`.
        scores, mask: the last check's Eq. 2 and choice, [groups] float and bool (true: goes); None
            before the first check. They stay as they were when the cut came.
    """

    def __init__(
        self,
        model: nn.Module,
        ratio: float,
        config: Config,
        optimizer: Optimizer,
        families: Families,
        *,
        steps: int = 0,
        also: Iterable[Also] = (),
    ) -> None:
        """Prepare to prune; see `ocsfast.attach`, which finds `families`.

        Args:
            steps: optimizer steps already taken.
            also: what holds copies of the model, and optimizers, that the cut follows too.

        Raises:
            ConfigError: a bad ratio, or one that cannot be reached.
            StateError: the optimizer, the weights or a copy are not what pruning needs.
        """
        self.ratio = checked_ratio(ratio)
        self.config = config
        self.families = families
        self.optimizer = optimizer
        self.scores: Tensor | None = None
        self.mask: Tensor | None = None
        self._model = weakref.ref(model)
        self._progress = Progress(steps=steps)
        self._masks: deque[Tensor] = deque(maxlen=config.lag)
        self._lam: Scalar = 0.0
        self._captured = False
        self._timetable = Timetable(config, optimizer)
        # How many groups of each family are left, where weights that were loaded said so.
        self._fitted: tuple[int, ...] | None = None
        self._processes = processes_of(model)
        with self._processes.together():
            self._timetable.require_steps_left(self._progress)
            self._copies = Copies(model, also)
            self._processes.require_copies(self._copies.of(model))
            parameters = dict(model.named_parameters(remove_duplicate=False))
            check_owner(optimizer, families, parameters)
            check_supported(optimizer, stepped=steps > 0)
            named = dict(model.named_parameters())
            self._aim = make_aim(families, named, config, self.ratio, record_of(model))
            self._freezing = Freezing(families, named, self._aim.ranking)
            self._coupled: penalty.Coupled | None = self._bind(parameters)
            self._clock = self._make_clock()
        self._processes.begin(self._facts())
        # By Eq. 2: what a criterion may need besides the weights is not there before the first step.
        choice = choose(self._aim, self._coupled.bound, "l2", config, optimizer)
        require_reachable(self._aim, choice, families, config, self.ratio)
        least = choose(replace(self._aim, budget=0), self._coupled.bound, "l2", config, optimizer).cost
        self._hooks = [
            optimizer.register_step_pre_hook(weak_hook(self._before_step)),
            optimizer.register_step_post_hook(weak_hook(self._after_step)),
        ]
        self._load_hooks = [
            module.register_load_state_dict_pre_hook(FitHook(weak_hook(self._fit)))  # type: ignore[no-untyped-call]
            for module in (model, *self._copies.modules(model))
        ]
        self._resting = StepReport(
            "observe",
            cost=self._aim.now,
            cost_dense=self._aim.dense,
            cost_at_cut=self._aim.now,
            unit=self._aim.cost_model.unit,
            kept=tuple((f.name, f.size, f.size) for f in families.families),
            dense=families.frozen,
        )
        self._least = least
        told = {name: getattr(config, name) for name in LENGTHS if getattr(config, name) is not None}
        said = ", ".join(f"{name}={value}" for name, value in told.items())
        self._watch = Watch(self._progress, speaks=self._processes.is_first, told=said)
        self._farewell = warn_at_end(self, self._watch)

    def announce(self) -> None:
        """Say in the log what may go, what stays and why, and when things are to happen."""
        families, plan = self.families, self._timetable.spoken(self._now())
        self._say(messages.attached(families, self._aim, self._least, self.ratio, plan))
        if families.frozen:
            self._say(messages.stays_dense(families.frozen))
        for note in families.notes:
            self._say(note, logging.WARNING)
        for frozen in families.frozen:
            self._say(f"{frozen.where} stays dense: {frozen.reason}", logging.DEBUG)
        unused = [frozen.where for frozen in families.frozen if frozen.reason == NOT_USED]
        if unused:
            self._say(
                f"{len(unused)} parameters were not used by the example inputs "
                f"({', '.join(unused[:3])} ...) and stay dense: inputs that do use them may find their "
                "neighbours cut. Pass example_inputs= that use all",
                logging.WARNING,
            )

    # What a user reads and calls.

    @property
    def stage(self) -> str:
        """ "observe", "sparsify" or "pruned"."""
        return self._progress.stage

    @property
    def history(self) -> list[StepReport]:
        """One report a check."""
        return self._progress.history

    @property
    def t_sl(self) -> int | None:
        """The check at which sparsity learning began (Eq. 5)."""
        return self._progress.t_sl

    @property
    def t_cut(self) -> int | None:
        """The check at which the cut came (Eq. 6)."""
        return self._progress.t_cut

    @property
    def steps(self) -> int:
        """Optimizer steps taken, as far as they were seen, but for those at learning rate 0."""
        return self._now().steps

    @property
    def attached(self) -> bool:
        """Whether it still drives the model, or has finished with it."""
        return bool(self._hooks) or self.stage == "pruned"

    @property
    def idle(self) -> bool:
        """Whether it waits for its optimizer, which has taken no step since the last call of `step`."""
        return self.stage != "pruned" and self.steps == self._progress.at_call

    def begin_at(self, steps: int, calls: int = 0) -> None:
        """Take it that `step` was called so often, the last time after so many optimizer steps."""
        self._progress.at_call = self._progress.begun = self._watch.since = steps
        self._progress.listened = calls

    def step(self, accuracy: float | None = None) -> StepReport:
        """Make a check if one is due, and cut if it says so.

        check_every="auto": calls that lie several optimizer steps apart are one check each; calls after
        every optimizer step make 50 in the whole run, and one per 500 steps at least. An integer: a
        check every that many steps.

        Args:
            accuracy: what your last validation gave, in any unit: kept in the report, said at the cut.

        Returns:
            The check's report; without a check, the last one with `cut` false.

        Raises:
            ConfigError: `epochs` was given, but this is called after every optimizer step.
            StateError: a weight is NaN or infinite or was replaced, or the pruner was detached. Whatever
                is raised, nothing has been changed then.
        """
        now = self._now()
        if accuracy is not None:
            self._resting = replace(self._resting, accuracy=told(accuracy))
        if now.stage == "pruned":
            return self._resting
        self._require_attached()
        self._watch.failed = now.steps  # until it has not
        require_apart(self.config, now.steps - now.at_call)
        report = self._evaluate(forced=False) if self._timetable.is_due(now) else self._resting
        self._watch.failed = -1
        now.calls, now.at_call = now.all_calls(), now.steps
        return report

    def cut(self) -> StepReport:
        """Decide by the weights as they are, and cut now, in whatever stage.

        Raises:
            StateError: it was cut already, or as for `step`.
        """
        if self.stage == "pruned":
            raise StateError(f"the model was cut already, at check {self.t_cut}")
        self._require_attached()
        return self._evaluate(forced=True)

    def detach(self) -> None:
        """Remove the optimizer hooks. The model stays as it is; this pruner cannot go on."""
        self._now()
        self._farewell.detach()
        for hook in (*self._hooks, *self._load_hooks):
            hook.remove()
        self._hooks, self._load_hooks = [], []
        if self._captured and self._coupled is not None and self._clock is not None:
            parts = (self._coupled.whole, *self._coupled.parts)
            scalars = [tensor for part in parts for tensor in (part.strength, part.factor)]
            capture.keep([*scalars, *self._clock.tensors()])
        self._coupled = self._clock = None

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs besides the model's and the optimizer's own state.

        CPU tensors, numbers, strings, lists and dicts: `torch.load(weights_only=True)` reads it.
        """
        return history.pack(self._now(), self._facts(), list(self._masks), self.mask, self.scores)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, with the model's and the optimizer's own state loaded as well.

        The run's length and `check_every` may differ from those of the state: the present ones count.
        Attach to a dense instance of the model first. If the cut had come by then, the model is cut
        here, unless its weights were loaded before and it has been cut to their shapes already.

        Raises:
            StateError: the state is of another model, ratio, configuration or number of processes, of
                another stage than the weights, or not a state at all. Nothing has been changed then.
        """
        if self._fitted is None:
            self._require_attached()
            if self.stage == "pruned":
                raise StateError("the model is cut already: attach to a dense instance to load a state")
        device = torch.device("cpu") if self._coupled is None else self._coupled.bound.plan.tables.device
        with self._processes.together():
            loaded = history.unpack(state, self._facts(), self.families, device)
            if loaded.replanned and loaded.progress.stage != "pruned":
                self._timetable.take_over(loaded.progress)
        mask = None if loaded.mask is None else loaded.mask.tolist()
        self._processes.begin(
            {"the state's stage": loaded.progress.stage, "mask": mask, "weights": self._fitted}
        )
        progress = loaded.progress
        if progress.stage == "pruned":
            assert loaded.mask is not None  # unpack() sees to it
            left = tuple(family.size for family in self.families.cropped(loaded.mask.cpu()).families)
            if self._fitted is None:
                self._remove(loaded.mask)
            elif left != self._fitted:
                raise StateError("the state and the weights that were loaded are of different cuts")
        elif self._fitted is not None:
            raise StateError(
                "the state is from before the cut, the weights that were loaded from after it: load "
                "both from one checkpoint"
            )
        self._progress, self.mask, self.scores = progress, loaded.mask, loaded.scores
        self._masks = deque(loaded.masks, maxlen=self.config.lag)
        self._watch.progress, self._watch.since = progress, progress.steps
        self._timetable.forget()
        self._tell_clock()
        if progress.history:
            self._resting = replace(progress.history[-1], cut=False, seconds=0.0)

    def _facts(self) -> dict[str, Any]:
        """What must be the same where a state is saved, where it is loaded, and on every process."""
        return {
            "ratio": self.ratio,
            "config": self.config.plain(),
            "families": [[family.name, family.size] for family in self.families.families],
            "processes": self._processes.size,
        }

    def _fit(self, module: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
        """Cut everything to the widths of weights that are about to be loaded into a module."""
        if self.stage == "pruned":
            return
        model = self._alive()
        if module not in (model, *self._copies.modules(model)):
            return
        pruned = surplus(self.families, shapes)
        if pruned is None:
            return
        running, self._load_hooks = self._load_hooks, []  # torch is just going through them
        try:
            self._remove(pruned)
        finally:
            self._load_hooks = running
        self._fitted = tuple(family.size for family in self.families.cropped(pruned).families)
        self._progress.stage = "pruned"
        cost = self._aim.cost_model(self._fitted)
        self._resting = replace(self._resting, stage="pruned", cost=cost, cost_at_cut=cost)

    # The optimizer's hooks: no host synchronisation here.

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if self._coupled is None or stands_still(optimizer):
            return None
        if capture.is_capturing(self._coupled.bound.plan.tables.device):
            self._require_capturable()
        if self._shrinking() is None:
            return None
        if self._freezing.look():
            self._hold()
        if not self._coupled.is_current():
            self._rebind()
        mask = self._shrinking()
        assert mask is not None  # the same, where the weights are now
        kind, parts = self.config.penalty, penalty.parts_now(self._coupled, optimizer)
        rate = penalty.mean_rate(parts, optimizer)
        scale: Scalar | None = self._progress.scale
        self._lam = self._lambda_now(rate) if self._clock is None else self._clock.lam(rate)
        if self._clock is not None and self.config.strength == "auto":
            scale = self._clock.scale
        penalty.prepare(parts, optimizer, self._lam, scale, kind)
        if isinstance(optimizer, OnePass) and kind != "none":
            penalty.hand_over(parts, optimizer, mask)
            return None
        if kind not in ("both", "lasso"):
            return None

        def lasso() -> None:
            penalty.add_lasso(parts, optimizer, mask)

        # `args` is (optimizer, *arguments of step)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            lasso()
            return None
        rest = {key: value for key, value in kwargs.items() if key != "closure"}
        return (args[0], followed_by(closure, lasso), *args[2:]), rest

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if stands_still(optimizer):
            return
        now, mask = self._progress, self._shrinking()
        if self._clock is None:
            now.steps += 1
        if self._coupled is None or mask is None:
            return
        parts = penalty.parts_now(self._coupled, optimizer)
        if not isinstance(optimizer, OnePass):
            self._coupled.forget()
        rate = penalty.mean_rate(parts, optimizer)
        skipped = overflowed(optimizer)
        if self._clock is not None:
            self._clock.count(self._lam, rate, skipped)
        elif skipped is None:
            now.nats = now.nats + self._lam * rate
        else:
            now.nats = now.nats + self._lam * rate * (skipped == 0).double()
        if self.config.penalty in ("both", "shrink") and not isinstance(optimizer, OnePass):
            penalty.shrink(parts, optimizer, mask)

    def _shrinking(self) -> Tensor | None:
        """The groups that an optimizer step shrinks; None where it has nothing to do."""
        if self._clock is not None:
            return self._clock.mask  # empty until sparsity learning begins
        return self.mask if self.stage == "sparsify" else None

    def _hold(self) -> None:
        """Leave alone what is frozen from now on; the next check chooses without it."""
        if self.mask is not None:
            self.mask = self._freezing.without_held(self.mask)
            if self._clock is not None:  # whose counts go on
                self._clock.mask.copy_(self.mask)

    def _require_capturable(self) -> None:
        if self._clock is None:
            raise StateError(
                "a CUDA graph is being captured, whose replays would not be counted and would repeat "
                "this step's lambda: attach with capturable=True before the capture"
            )
        self._captured = True

    def _now(self) -> Progress:
        """Where the run stands, with the steps that a device has counted."""
        if self._clock is not None:
            self._clock.settle(self._progress)
        return self._progress

    def _tell_clock(self) -> None:
        if self._clock is not None:
            self._clock.load(self._progress, self.mask)

    def _lambda_now(self, rate: Scalar) -> Scalar:
        """Eq. 7, or the automatic ramp, for the coming optimizer step."""
        now = self._progress
        if now.t_sl is None or now.start is None or self.config.penalty == "none":
            return 0.0
        if self.config.strength == "paper":
            return schedule.paper_lambda(self.config, now.check - now.t_sl)
        ramp = schedule.Ramp(self.config.nats, now.planned, self.config.shape)
        return penalty.lambda_for(rate, ramp.at(now.steps - now.start))

    # A check.

    @torch.inference_mode(False)  # a mode that a validation loop may leave on: weights would stay in it
    def _evaluate(self, forced: bool) -> StepReport:
        begun = time.perf_counter()
        with self._processes.together():
            require_between_steps(self._alive())
            now = self._now()
            self._timetable.require_steps_left(now)
            self._processes.require_cuttable()
            coupled = self._current()
        before = replace(now, indices=[*now.indices], history=[*now.history])
        masks, scores, mask = self._masks.copy(), self.scores, self.mask
        try:
            report = self._check(coupled, forced)
            if report.cut:
                assert self.mask is not None  # the check has just made it
                report = replace(report, stale=stale_sizes(self._alive(), self.families, self.mask))
                self._remove(self.mask)
        except BaseException:
            self._progress, self._masks, self.scores, self.mask = before, masks, scores, mask
            self._watch.progress = before
            self._timetable.forget()
            self._tell_clock()
            raise
        self._tell_clock()
        unit, accuracy = self._resting.unit, self._resting.accuracy
        report = replace(report, unit=unit, accuracy=accuracy, seconds=time.perf_counter() - begun)
        self._watch.speaks = self._processes.is_first
        if report.cut:
            now.stage, now.t_cut = "pruned", now.check
            self._say(messages.cut_made(report, self.ratio))
            too_much = overshoot(self._aim, report.cost_at_cut)
            if too_much > MUCH:
                self._say(
                    messages.too_much(too_much, coarsest(self._aim, self.families)), logging.WARNING
                )
            if report.stale:
                self._say(messages.stale(report.stale))
            assert self.mask is not None  # of the check
            followed = followed_sizes(self.families, self.mask)
            if followed:
                self._say(messages.followed(followed))
            if self._captured:
                logger.warning(
                    "the CUDA graphs captured so far train the model of before the cut: capture again"
                )
        else:
            plan, held = self._timetable.plan(now), self._freezing.named()
            self._watch.why = messages.why_uncut(self.config, plan, held)
        now.history.append(report)
        self._resting = replace(report, cut=False, seconds=0.0)
        return report

    def _check(self, coupled: penalty.Coupled, forced: bool) -> StepReport:
        """Choose anew; what the report says of a cut, if it says so, has yet to be made."""
        config, now = self.config, self._progress
        self._freezing.look()
        aim = self._aim.without(self._freezing.families) if self._freezing.families else self._aim
        if self._processes.size > 1:  # to read the masks waits for the device
            self._processes.require_agreement(
                {
                    **self._facts(),
                    "dtypes": [str(w.dtype) for w in coupled.bound.weights],
                    "progress": (now.stage, now.check, now.steps, now.at_check, float(now.nats)),
                    "choice": [mask.tolist() for mask in self._masks],
                    "frozen": sorted(self._freezing.families),
                }
            )
        choice = self._shared(
            choose(aim, coupled.bound, config.criterion, config, self.optimizer, list(self._masks))
        )
        if choice.stability is not None:
            now.indices.append(choice.stability)
        now.check += 1
        now.at_check, now.every = now.steps, 0
        self._masks.append(choice.mask)
        self.scores, self.mask = choice.scores, choice.mask

        stage = self._timetable.plan(now)
        if not forced and self._timetable.lacks_length(now, stage):
            self._say(messages.unplanned(now, self._timetable.latest_checks(now)), logging.WARNING)
        for level, text in self._freezing.told(choice.cost <= aim.budget, self.ratio):
            self._say(text, level)
        if choice.cost == aim.now and forced:
            raise StateError("nothing can be cut: all that might go is frozen (requires_grad=False)")
        late = self._timetable.is_late(now, stage) and choice.cost < aim.now
        ready = self._is_ready(choice) and choice.cost <= aim.budget
        cut = forced or late or ready
        if late and not ready and not forced:
            level, text = messages.deadline_came(now.check, choice.residual, config.max_residual)
            self._say(text, level)
        may = choice.cost < aim.now and self._timetable.should_start(now, stage)
        if not cut and now.stage == "observe" and may:
            self._begin(choice, coupled)

        rate = penalty.mean_rate(penalty.parts_now(coupled, self.optimizer), self.optimizer)
        return StepReport(
            stage="pruned" if cut else now.stage,
            check=now.check,
            stability=choice.stability,
            mean_stability=stability.mean_stability(now.indices, self.config.window),
            lam=float(self._lambda_now(rate)) if now.stage == "sparsify" and not cut else 0.0,
            nats=float(now.nats),
            residual=choice.residual,
            changed=choice.changed,
            cost=choice.cost if cut else self._aim.now,
            cost_at_cut=choice.cost,
            cost_dense=self._aim.dense,
            cut=cut,
            forced=cut and not ready,
            kept=tuple(
                (f.name, kept, f.size)
                for f, kept in zip(self.families.families, choice.kept, strict=True)
            ),
            dense=(*self.families.frozen, *self._freezing.named()),
        )

    def _shared(self, choice: Choice) -> Choice:
        """Rank 0's choice where several processes train the model; else this one."""
        if self._processes.size == 1:
            return choice
        device = choice.mask.device
        first = self._processes.first_of_all(
            replace(choice, scores=choice.scores.cpu(), mask=choice.mask.cpu())
        )
        return replace(first, scores=first.scores.to(device), mask=first.mask.to(device))

    def _is_ready(self, choice: Choice) -> bool:
        """Eq. 6, and little enough left in what goes."""
        now = self._progress
        if now.t_sl is None or now.check <= now.t_sl:
            return False
        most = self.config.max_residual
        small = most is None or choice.residual < most
        return small and stability.is_stable(now.indices, self.config.window, self.config.epsilon)

    def _begin(self, choice: Choice, coupled: penalty.Coupled) -> None:
        now = self._progress
        now.stage, now.t_sl, now.start = "sparsify", now.check, now.steps
        # Planned once: a length that moved with every estimate would make the sum of lambda * lr drift.
        now.planned = self._timetable.plan(now).steps
        if self.config.strength == "auto":
            now.scale = mean_pruned_norm(coupled.bound, choice.mask)
        gone, all_groups = int(choice.mask.sum()), self.families.num_groups
        ramp = self.config.strength == "auto"
        self._say(messages.sparsity_begins(now, gone, all_groups, ramp))

    def _remove(self, pruned: Tensor) -> None:
        """Cut the model and all that follows it, and drive it no longer."""
        optimizers = [self.optimizer, *self._copies.optimizers]
        model, changed = self._alive(), False
        copies = self._copies.of(model)
        record = make_record(self.families, pruned, dict(model.named_parameters()), record_of(model))
        try:
            with cutting(model, self.families, pruned, optimizers, copies, record):
                changed = True
                self._processes.rebuild()
        except BaseException:
            if changed:
                self._processes.rebuild()  # for the model as it was
            raise
        self.detach()

    def _say(self, text: str, level: int = logging.INFO) -> None:
        """Log on one process of all, as a run has one log to read."""
        if self._processes.is_first:
            logger.log(level, "%s", text)

    # The model.

    def _require_attached(self) -> None:
        if not self._hooks:
            raise StateError("this pruner was detached: attach again")

    def _alive(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise StateError("the model this pruner was attached to no longer exists")
        return model

    def _bind(self, parameters: Mapping[str, nn.Parameter]) -> penalty.Coupled:
        return self._processes.bind(self.families, parameters, self.optimizer, self.config.include_bias)

    def _rebind(self) -> None:
        """Weights were moved or converted: build the plan for where and what they are now."""
        assert self._coupled is not None  # there are hooks
        if capture.is_capturing(self._coupled.bound.weights[0].device):
            raise StateError(
                "the weights were moved or converted since the last step: take a step before a CUDA "
                "graph is captured"
            )
        self._coupled = self._bind(dict(self._alive().named_parameters(remove_duplicate=False)))
        device = self._coupled.bound.plan.tables.device
        self._masks = deque((m.to(device) for m in self._masks), maxlen=self.config.lag)
        self.mask = None if self.mask is None else self.mask.to(device)
        if self._clock is not None and self._clock.mask.device != device:
            self._now()
            self._clock = self._make_clock()
            self._tell_clock()

    def _make_clock(self) -> Clock | None:
        if not self.config.capturable or self._coupled is None:
            return None
        device = self._coupled.bound.plan.tables.device
        return Clock(self.config, self.families.num_groups, device)

    def _current(self) -> penalty.Coupled:
        """The plan, after making sure that it still describes the model."""
        assert self._coupled is not None  # there are hooks
        parameters = dict(self._alive().named_parameters(remove_duplicate=False))
        penalty.check_identity(self._coupled, parameters, self.optimizer)
        if not self._coupled.is_current():
            self._rebind()
        return self._coupled
