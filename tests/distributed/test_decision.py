"""One choice for all processes, whatever each would choose."""

from __future__ import annotations

from typing import Any

import torch

from ocsfast.choice.selection import Choice
from ocsfast.distributed.decision import one_choice


def choice(cost: int) -> Choice:
    mask = torch.arange(4) < cost
    return Choice(torch.rand(4), mask, cost, 0.0, None, 0, (4 - cost,))


class Several:
    """Processes as rank 1 of two sees them; rank 0 has chosen otherwise."""

    def __init__(self, size: int, theirs: Choice) -> None:
        self.size, self.theirs, self.compared = size, theirs, list[Any]()

    def require_agreement(self, facts: Any) -> None:
        self.compared.append(facts)

    def first_of_all(self, mine: Choice) -> Choice:
        assert mine.mask.device.type == mine.scores.device.type == "cpu"
        return self.theirs


def test_the_first_processs_choice_is_everybodys() -> None:
    theirs = choice(3)
    several: Any = Several(2, theirs)
    made = one_choice(several, lambda: {"fact": 1}, lambda: choice(1))
    assert (made.cost, made.kept) == (3, (1,))
    assert torch.equal(made.mask, theirs.mask)
    assert torch.equal(made.scores, theirs.scores)
    assert several.compared == [{"fact": 1}]


def test_one_process_chooses_for_itself_and_compares_nothing() -> None:
    alone: Any = Several(1, choice(3))
    assert one_choice(alone, lambda: 1 / 0, lambda: choice(1)).cost == 1
    assert not alone.compared
