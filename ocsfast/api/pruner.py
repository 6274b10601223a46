"""The order of things: observe, sparsify, cut (Algorithm 1), driven by the optimizer's own steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ocsfast.api.check import make_check
from ocsfast.api.parts import put_together
from ocsfast.api.resume import LoadHooks, load_state
from ocsfast.core.config import Config
from ocsfast.core.errors import StateError
from ocsfast.core.families import Families
from ocsfast.cut.copies import Also
from ocsfast.cut.sizes import stale_sizes
from ocsfast.run import messages
from ocsfast.run.report import StepReport, told
from ocsfast.run.state import pack
from ocsfast.run.timetable import require_apart
from ocsfast.run.uncut import Watch, warn_at_end


class Pruner:
    """Watches a model, shrinks what will go, and cuts it out; `ocsfast.attach` makes it.

    Attributes:
        config, ratio, optimizer: as given.
        families: the structure at attach, which numbers the groups of `scores` and `mask`.

    Examples:
        >>> import ocsfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x = torch.randn(4, 8)
        >>> pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=x, total_steps=100)
        >>> pruner.cut().stage, model[0].out_features
        ('pruned', 8)
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
            ratio: the share of the target that is removed, in (0, 1).
            steps: optimizer steps already taken.
            also: what holds copies of the model, and optimizers, that the cut follows too.

        Raises:
            ConfigError: a ratio that cannot be reached.
            StateError: the optimizer, the weights or a copy are not what pruning needs.
        """
        self.ratio = ratio
        self.config = config
        self.families = families
        self.optimizer = optimizer
        self._parts = put_together(model, ratio, config, optimizer, families, steps, also)
        self._state, self._hooks = self._parts.state, self._parts.hooks
        self._timetable, self._processes = self._parts.timetable, self._parts.processes
        self._processes.begin({**self._parts.facts(), "latency": self._parts.latency()})
        self._least = self._parts.require_reachable()
        self._hooks.register(self._check_between)
        self._load_hooks = LoadHooks(self._parts)
        self._watch = Watch(self._state.progress, config.length(), speaks=self._processes.is_first)
        self._farewell = warn_at_end(self, self._watch)

    def announce(self) -> None:
        """Say in the log what may go, what stays and why, and when things are to happen."""
        plan = self._timetable.spoken(self._hooks.settle())
        lines = messages.at_attach(self.families, self._parts.aim, self._least, self.ratio, plan)
        self._processes.log_lines(lines)

    @property
    def stage(self) -> str:
        """ "observe", "sparsify" or "pruned"."""
        return self._state.progress.stage

    @property
    def history(self) -> list[StepReport]:
        """One report for each check."""
        return self._state.progress.history

    @property
    def scores(self) -> Tensor | None:
        """The last check's scores, [groups]; None before the first. They stay when the cut comes."""
        return self._state.scores

    @property
    def mask(self) -> Tensor | None:
        """The last check's choice, [groups] bool, true where a group goes; None before the first."""
        return self._state.mask

    @property
    def t_sl(self) -> int | None:
        """The check at which sparsity learning began (Eq. 5)."""
        return self._state.progress.t_sl

    @property
    def t_cut(self) -> int | None:
        """The check at which the cut came (Eq. 6)."""
        return self._state.progress.t_cut

    @property
    def steps(self) -> int:
        """Optimizer steps taken, as far as they were seen, but for those at learning rate 0."""
        return self._hooks.settle().steps

    @property
    def attached(self) -> bool:
        """Whether it still drives the model, or has finished with it."""
        return self._hooks.registered or self.stage == "pruned"

    @property
    def idle(self) -> bool:
        """Whether its optimizer has taken no step since the last call of `step`."""
        return self.stage != "pruned" and self.steps == self._state.progress.at_call

    def begin_at(self, steps: int, calls: int = 0) -> None:
        """Take it that `step` was called so often, the last time after so many optimizer steps."""
        now = self._state.progress
        now.at_call = now.begun = self._watch.since = steps
        now.listened = calls

    def step(self, accuracy: float | None = None) -> StepReport:
        """Make a check if one is due, and cut if it says so.

        check_every="auto": 200 checks in the whole run, once its length is known. Those that fall
        between two calls are made at the end of an optimizer step. Any of them may begin sparsity
        learning, but only those in a call cut. In a run of unknown length: one in each call, or one per
        500 steps where calls come after every step. "call": one in each call. An integer: one every so
        many steps, in the next call.

        Args:
            accuracy: what your last validation gave, in any unit: kept in the report, said at the cut.

        Returns:
            The check's report; without a check, the last one with `cut` false.

        Raises:
            ConfigError: `epochs` was given, but this is called after every optimizer step.
            StateError: a weight is NaN or infinite or was replaced, or the pruner was detached. Whatever
                is raised, nothing has been changed then.
        """
        now = self._hooks.settle()
        if accuracy is not None:
            self._state.report = replace(self._state.report, accuracy=told(accuracy))
        if now.stage == "pruned":
            return self._state.report
        self._parts.require_attached()
        self._watch.failed = now.steps  # until it has not
        require_apart(self.config, now.steps - now.at_call)
        self._timetable.note(now)
        report = self._evaluate(forced=False) if self._timetable.is_due(now) else self._state.report
        self._watch.failed = -1
        self._timetable.note_length(now)
        now.apart = now.steps - now.at_call
        now.calls, now.at_call = now.all_calls(), now.steps
        return report

    def _check_between(self) -> None:
        """After an optimizer step: make a check if one is due.

        What goes wrong is left to the next call of `step`, whose errors a training loop expects. Not
        where several processes train: one that went on would leave the others waiting.
        """
        now = self._state.progress
        now.between = True
        try:
            self._timetable.note(now)
            if self._timetable.is_due(now):
                self._evaluate(forced=False)
        except Exception:
            if self._processes.size > 1:
                raise
            now.waits = True
        finally:
            now.between = False

    def cut(self) -> StepReport:
        """Decide by the weights as they are, and cut now, in whatever stage.

        Raises:
            StateError: it was cut already, or as for `step`.
        """
        if self.stage == "pruned":
            raise StateError(f"the model was cut already, at check {self.t_cut}")
        self._parts.require_attached()
        return self._evaluate(forced=True)

    def end_loading(self) -> None:
        """Let weights that arrive by `load_state_dict` cut the model no longer.

        Needed where a copy of the model is pickled whole, to be read without ocsfast: what cuts it is a
        hook, and pickles keep a mark of it.
        """
        self._load_hooks.remove()

    def detach(self) -> None:
        """Remove all hooks. The model stays as it is; this pruner cannot go on."""
        self._farewell.detach()
        self._hooks.remove()
        self._load_hooks.remove()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs besides the model's and the optimizer's own state.

        CPU tensors, numbers, strings, lists and dicts: `torch.load(weights_only=True)` reads it.
        """
        self._hooks.settle()
        return {**pack(self._state, self._parts.facts()), **self._parts.found()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, with the model's and the optimizer's own state loaded as well.

        The run's length and `check_every` may differ from those of the state: the present ones count.
        Attach to a dense instance of the model first. If the cut had come by then, the model is cut
        here, unless its weights were loaded before and it has been cut to their shapes already.

        Raises:
            StateError: the state is of another model, ratio, configuration or number of processes, of
                another stage than the weights, or not a state at all. Nothing has been changed then.
        """
        load_state(self._parts, state)
        if self.stage == "pruned":
            self.detach()
        self._watch.since = self._state.progress.steps

    @torch.inference_mode(False)  # a validation loop may leave it on: weights would stay in it
    def _evaluate(self, forced: bool) -> StepReport:
        """Make a check and what follows from it; if that fails, nothing has happened."""
        begun = time.perf_counter()
        coupled, now = self._parts.ready(), self._state.progress
        before = self._state.copied()
        try:
            report = make_check(self._parts, coupled, forced)
            mask = self._state.mask
            assert mask is not None  # the check has just made it
            if report.cut:
                report = replace(report, stale=stale_sizes(self._parts.alive(), self.families, mask))
                self._parts.remove(mask)
                self.detach()
        except BaseException:
            self._parts.restore(before)
            raise
        self._hooks.update_clock()
        report = replace(report, seconds=time.perf_counter() - begun)
        self._watch.speaks = self._processes.is_first
        if report.cut:
            now.stage, now.t_cut = "pruned", now.check
            captured = self._hooks.captured
            self._processes.log_lines(
                messages.at_cut(report, self.ratio, self._parts.aim, self.families, mask, captured)
            )
        else:
            plan, held = self._timetable.plan(now), self._parts.freezing.named()
            self._watch.why = messages.why_uncut(self.config, plan, held)
        now.history.append(report)
        self._state.report = replace(report, cut=False, seconds=0.0)
        return report
