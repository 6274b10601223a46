"""What a pruner asks of the processes that train a model together."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ocsfast.core.errors import StateError
from ocsfast.core.families import Families
from ocsfast.cut.removal import Copy
from ocsfast.optim import coupled

logger = logging.getLogger("ocsfast")

T = TypeVar("T")


class Processes(ABC):
    """The processes that train a model together.

    `ddp.Replicas` each hold a copy of it, `fsdp.Shards` each hold a part. A pruner in every process asks
    the same questions in the same order, so that all of them prune alike.
    """

    @property
    @abstractmethod
    def process_group(self) -> dist.ProcessGroup | None:
        """torch's group through which they communicate; None if this process trains alone."""

    @property
    def size(self) -> int:
        """How many processes train together."""
        process_group = self.process_group
        return 1 if process_group is None else dist.get_world_size(process_group)

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0, the one that logs for all."""
        process_group = self.process_group
        if process_group is not None:
            return dist.get_rank(process_group) == 0
        # The model may yet be wrapped. Until then the rank in the default process group is a good guess.
        return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0

    def log(self, text: str, level: int = logging.INFO) -> None:
        """Log on one process of all, as a run has one log to read."""
        if self.is_first:
            logger.log(level, "%s", text)

    def log_lines(self, lines: Iterable[tuple[int, str]]) -> None:
        """The same with several: levels and texts."""
        for level, text in lines:
            self.log(text, level)

    def together(self) -> AbstractContextManager[None]:
        """A context in which an error on one rank is raised on all.

        It does nothing where processes need not wait for each other inside.
        """
        return nullcontext()

    @abstractmethod
    def begin(self, facts: Mapping[str, Any]) -> None:
        """Called before a pruner does anything, and when it resumes from a state.

        Args:
            facts: what must be equal in all processes, by name.
        """

    def require_copies(self, copies: Sequence[Copy]) -> None:  # noqa: B027  (a whole model accepts all)
        """Refuse copies of the model that could not be cut with it.

        Raises:
            StateError: with the reason.
        """

    def bind(
        self,
        families: Families,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        include_bias: bool,
    ) -> coupled.Coupled:
        """As `coupled.bind`, for the weights as they lie in these processes. Does not communicate."""
        return coupled.bind(families, parameters, optimizer, include_bias)

    @abstractmethod
    def require_cuttable(self) -> None:
        """Refuse, before a check, to go on where the cut could not follow.

        Raises:
            StateError: with the reason.
        """

    def rebuild(self) -> None:  # noqa: B027  (most have nothing to rebuild)
        """Build anew, after a cut, whatever was built from the parameters' sizes."""

    def require_agreement(self, facts: Mapping[str, Any]) -> None:
        """Check that all processes are about to decide by the same facts.

        Args:
            facts: by name; compared by their `repr`.

        Raises:
            StateError: in every process, if one of them differs; it names the fact and the rank.
        """
        process_group = self.process_group
        if process_group is None:
            return
        mine = {name: _digest(value) for name, value in facts.items()}
        theirs: list[Any] = [None] * self.size
        dist.all_gather_object(theirs, mine, group=process_group)
        for name in facts:
            different = [rank for rank, other in enumerate(theirs) if other[name] != theirs[0][name]]
            if different:
                raise StateError(
                    f"the processes have drifted apart: {name} of rank {different[0]} differs from "
                    "rank 0's. Each has to train the same model with the same options, and to call "
                    "ocsfast.step after the same steps"
                )

    def first_of_all(self, value: T) -> T:
        """Rank 0's value, on every rank. It must not hold a tensor on an accelerator."""
        process_group = self.process_group
        if process_group is None:
            return value
        box = [value]
        first = dist.get_global_rank(process_group, 0)
        dist.broadcast_object_list(box, src=first, group=process_group)
        return box[0]


def _digest(value: Any) -> str:
    """Sixteen bytes that stand for a value, so that long ones need not be sent."""
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()
