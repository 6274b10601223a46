"""One choice for all processes: they compare what they choose by, and rank 0's choice is everybody's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ocsfast.choice.selection import Choice
from ocsfast.distributed.processes import Processes


def one_choice(
    processes: Processes, facts: Callable[[], Mapping[str, Any]], choose: Callable[[], Choice]
) -> Choice:
    """What goes, decided once.

    Each process chooses, because on sharded weights that communicates. Rounding may differ between
    devices, so that only one of these choices counts.

    Args:
        processes: that train the model together.
        facts: what has to be equal on all of them, by name; asked for only where there are several.
        choose: this process's own choice.

    Raises:
        StateError: on every process, if one of the facts differs.
    """
    if processes.size == 1:
        return choose()
    processes.require_agreement(facts())
    mine = choose()
    device = mine.mask.device
    first = processes.first_of_all(replace(mine, scores=mine.scores.cpu(), mask=mine.mask.cpu()))
    return replace(first, scores=first.scores.to(device), mask=first.mask.to(device))
