"""What must fail on every process if it fails on one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from ocsfast.core.errors import StateError


@contextmanager
def raised_together(group: dist.ProcessGroup) -> Iterator[None]:
    """Raise on every rank what one of them raises inside, so that none waits for it in vain.

    What is inside must not communicate after the first thing that may fail. Every rank has to call.

    Raises:
        StateError: with what another rank said; on that one, its own error.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    said: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, None if mine is None else str(mine), group=group)
    if mine is not None:
        raise mine
    for rank, message in enumerate(said):
        if message is not None:
            raise StateError(f"rank {rank} refused: {message}")
