"""Errors that every process raises if one of them does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from ocsfast.core.errors import StateError


@contextmanager
def raised_together(process_group: dist.ProcessGroup) -> Iterator[None]:
    """Raise on every rank what one rank raises inside, so that the others do not wait for it forever.

    Every rank has to enter the context. What is inside must not communicate after the first statement
    that may fail.

    Raises:
        StateError: on the other ranks, with the number and the message of the one that failed. That one
            raises its own error.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    said: list[str | None] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(said, None if mine is None else str(mine), group=process_group)
    if mine is not None:
        raise mine
    for rank, message in enumerate(said):
        if message is not None:
            raise StateError(f"rank {rank} refused: {message}")
