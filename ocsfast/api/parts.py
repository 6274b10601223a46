"""What a pruner is made of, and the cut of all that it drives."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ocsfast.choice.budget import Aim, make_aim, require_reachable, with_multiple
from ocsfast.choice.freezing import Freezing
from ocsfast.choice.selection import choose, with_fitting_multiple
from ocsfast.choice.targets import make_record
from ocsfast.core.config import Config
from ocsfast.core.errors import StateError
from ocsfast.core.families import Families
from ocsfast.core.latency import LatencyRecord
from ocsfast.cut.copies import Also, Copies
from ocsfast.cut.record import record_of
from ocsfast.cut.removal import cutting, require_between_steps
from ocsfast.distributed.placement import processes_of
from ocsfast.distributed.processes import Processes
from ocsfast.optim.coupled import Coupled
from ocsfast.optim.owners import check_owner, check_supported
from ocsfast.run.hooks import Parameters, StepHooks
from ocsfast.run.report import StepReport
from ocsfast.run.state import Progress, RunState
from ocsfast.run.timetable import Timetable


@dataclass(eq=False)
class Parts:
    """What a pruner is made of. None of it refers to the pruner, which ends when its user drops it."""

    model: weakref.ref[nn.Module]
    ratio: float
    config: Config
    optimizer: Optimizer
    families: Families
    processes: Processes
    timetable: Timetable
    state: RunState
    copies: Copies  # of the model, which the cut follows
    aim: Aim
    freezing: Freezing
    hooks: StepHooks
    # How many groups of each family are left, where weights that were loaded said so.
    fitted: tuple[int, ...] | None = field(default=None, init=False)

    def facts(self) -> dict[str, Any]:
        """What must be the same where a state is saved, where it is loaded, and on every process."""
        return {
            "ratio": self.ratio,
            "config": self.config.plain(),
            "families": [[family.name, family.size] for family in self.families.families],
            "processes": self.processes.size,
        }

    def latency(self) -> dict[str, Any] | None:
        """What was measured, if the target is latency."""
        target = self.config.target
        if not isinstance(target, LatencyRecord):
            return None
        return {"table": target.plain(), "dense": self.aim.dense}

    def found(self) -> dict[str, Any]:
        """What this machine has said, where the options leave it that: a resumed run goes on with it."""
        return {"latency": self.latency(), "multiple": self.aim.multiple}

    def alive(self) -> nn.Module:
        """The model.

        Raises:
            StateError: it is gone.
        """
        return _alive(self.model)

    def require_attached(self) -> None:
        """Refuse to go on once the optimizer's hooks are removed.

        Raises:
            StateError: they are.
        """
        if not self.hooks.registered:
            raise StateError("this pruner was detached: attach again")

    def ready(self) -> Coupled:
        """The plan of the weights as they are, for a check; refused on every process if on one.

        Raises:
            StateError: a training step is under way, a weight was replaced, or the processes could not
                carry on after a cut.
        """
        with self.processes.together():
            require_between_steps(self.alive())
            self.timetable.require_steps_left(self.hooks.settle())
            if not self.state.progress.between:  # then nothing is cut
                self.processes.require_cuttable()
            return self.hooks.current()

    def restore(self, state: RunState) -> None:
        """Go on from another state of the run."""
        self.state.become(state)
        self.timetable.forget()
        self.hooks.update_clock()

    def remove(self, pruned: Tensor) -> None:
        """Cut the model and all that follows it, and drive it no longer.

        Args:
            pruned: [groups] bool, the groups that go.

        Raises:
            StateError: it cannot be cut as it is now. Whatever is raised, nothing has been changed then.
        """
        optimizers = [self.optimizer, *self.copies.optimizers]
        model, changed = self.alive(), False
        copies, sharing = self.copies.of(model), self.copies.sharing(model)
        latency = None
        if isinstance(self.config.target, LatencyRecord):
            left = self.aim.cost_model(self.families.cropped(pruned.cpu()).sizes)
            latency = (self.aim.dense, left)
        parameters, before = dict(model.named_parameters()), record_of(model)
        record = make_record(self.families, pruned, parameters, before, latency)
        try:
            with cutting(model, self.families, pruned, optimizers, copies, record):
                changed = True
                self.processes.rebuild()
        except BaseException:
            if changed:
                self.processes.rebuild()  # for the model as it was
            raise
        for tensor, owner in sharing:
            tensor.data = owner.data
        self.hooks.remove()

    def set_multiple(self, multiple: int) -> None:
        """Take another multiple for round_to="auto"."""
        named = dict(self.alive().named_parameters())
        self.aim = with_multiple(self.aim, self.families, named, "auto", multiple)

    def require_reachable(self) -> int:
        """Refuse a ratio that cannot be reached; returns the lowest cost that can.

        Before, round_to="auto" becomes a multiple that reaches it; rank 0's, where several processes
        train.

        Scores are Eq. 2's, because other criteria may need gradients, which do not exist yet.

        Raises:
            ConfigError: naming the largest ratio that can be reached.
        """
        coupled = self.hooks.coupled
        assert coupled is not None  # the hooks are in place
        if self.config.round_to == "auto":
            # Ranks on other processors begin at the same multiple: where the model is sharded, every
            # choice is made together.
            self.set_multiple(self.processes.first_of_all(self.aim.multiple))
            named, multiple = dict(self.alive().named_parameters()), self.aim.multiple
            # What is wrong is raised below, where no other process waits for this one.
            with suppress(StateError):
                multiple = with_fitting_multiple(self.aim, self.families, named, coupled.bound).multiple
            self.set_multiple(self.processes.first_of_all(multiple))
        cost = choose(self.aim, coupled.bound).cost
        require_reachable(self.aim, cost, self.families, self.config, self.ratio)
        return choose(replace(self.aim, budget=0), coupled.bound).cost


def put_together(
    model: nn.Module,
    ratio: float,
    config: Config,
    optimizer: Optimizer,
    families: Families,
    steps: int,
    also: Iterable[Also],
) -> Parts:
    """All that a pruner needs, checked; the optimizer's hooks are not registered yet.

    Raises:
        ConfigError, StateError: as `Pruner` says; on every process if on one.
    """
    state = RunState(Progress(steps=steps), deque(maxlen=config.lag))
    timetable, processes = Timetable(config, optimizer), processes_of(model)
    with processes.together():
        timetable.require_steps_left(state.progress)
        copies = Copies(model, also)
        processes.require_copies(copies.of(model))
        check_owner(optimizer, families, dict(model.named_parameters(remove_duplicate=False)))
        check_supported(optimizer, stepped=steps > 0)
        named = dict(model.named_parameters())
        aim = make_aim(families, named, config, ratio, record_of(model))
        freezing = Freezing(families, named, aim.ranking)
        reference = weakref.ref(model)

        def parameters() -> Parameters:
            return dict(_alive(reference).named_parameters(remove_duplicate=False))

        def bind(found: Parameters) -> Coupled:
            return processes.bind(families, found, optimizer, config.include_bias)

        hooks = StepHooks(config, optimizer, state, freezing, parameters, bind)
    state.report = StepReport(
        "observe",
        cost=aim.now,
        cost_dense=aim.dense,
        cost_at_cut=aim.now,
        unit=aim.cost_model.unit,
        kept=tuple((f.name, f.size, f.size) for f in families.families),
        frozen=families.frozen,
    )
    return Parts(
        *(reference, ratio, config, optimizer, families, processes, timetable, state, copies, aim),
        *(freezing, hooks),
    )


def _alive(reference: weakref.ref[nn.Module]) -> nn.Module:
    model = reference()
    if model is None:
        raise StateError("the model this pruner was attached to no longer exists")
    return model
