"""The warning of a run that ends with its model uncut, when pruner or process is gone."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.util
import os
import weakref
from dataclasses import dataclass, field
from typing import Any

from ocsfast.run.messages import WAY_OUT
from ocsfast.run.state import Progress

logger = logging.getLogger("ocsfast")


@dataclass
class Watch:
    """What is left to tell of a pruner that is gone; holds nothing that would keep it alive."""

    progress: Progress
    told: str = ""  # the run's length as the options say it, as "epochs=90"
    since: int = 0  # optimizer steps when it began to watch
    speaks: bool = True  # on one process of those that train together
    why: str = ""  # it is uncut, by the last check
    failed: int = -1  # optimizer steps when the last call raised, which says more than this would
    process: int = field(default_factory=os.getpid)  # a fork of it has nothing to say

    def warn(self) -> None:
        now = self.progress
        silent = (
            now.stage == "pruned"
            or not self.speaks
            or self.process != os.getpid()
            or self.failed == now.steps
        )
        if silent or now.steps <= self.since:
            return
        if now.check:
            why = self.why or "it was resumed and made no check since"
        elif now.calls:
            why = "no check was due: without a known length there is one in 500 optimizer steps"
        else:
            why = "step was not called"
        way = f"The run's length was told by {self.told}" if self.told else WAY_OUT
        logger.warning(
            "the model was never cut: the run ended after %d optimizer steps and %d checks, in stage "
            "'%s'; %s. %s. To cut at once, at any time: Pruner.cut(), of what ocsfast.attach returns. "
            "Nothing is lost if the run is to be resumed from a saved state",
            now.steps,
            now.check,
            now.stage,
            why,
            way,
        )


@dataclass
class Listener:
    """As `Watch`, of `ocsfast.step` calls that have not attached yet."""

    steps: int  # of the optimizer at the first call
    speaks: bool
    failed: bool = False
    process: int = field(default_factory=os.getpid)

    def warn(self) -> None:
        if self.speaks and not self.failed and self.process == os.getpid():
            logger.warning(
                "the model was never cut: ocsfast.step was called after %d optimizer steps to listen "
                "for the model's input, and no later call attached. Call it once an epoch, twice at "
                "least, or pass example_inputs=; or use ocsfast.attach ahead of the loop. Nothing is "
                "lost if the run is to be resumed",
                self.steps,
            )


def warn_at_end(watched: object, watch: Watch | Listener) -> weakref.finalize[..., Any]:
    """Let `watch` speak when `watched` is collected or the process ends; `detach` keeps it silent."""
    farewell = weakref.finalize(watched, watch.warn)
    if multiprocessing.parent_process() is not None:  # its end runs no atexit, where `finalize` lies
        multiprocessing.util.Finalize(None, farewell, exitpriority=0)
    return farewell
