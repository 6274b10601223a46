"""Uniform cuts (`Config.uniform`): those that a model's `config` can say, to build it anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ocsfast.core.families import Families
from ocsfast.cut.model_config import update_config
from ocsfast.cut.removal import remove_groups
from ocsfast.grouping.proof.copies import copied


def expressible(model: nn.Module, families: Families) -> Families:
    """The families whose cut the model's config can say; the others are left dense, and named.

    Families of one kind and size keep equally many groups. For each kind and size three kept counts are
    tried on copies without data, together with the families that passed before.
    """
    alike: dict[tuple[str, int], list[int]] = {}
    for f, family in enumerate(families.families):
        alike.setdefault((family.kind, family.size), []).append(f)
    empty = copied(model).to("meta")
    passed: list[int] = []
    refused: dict[int, str] = {}
    for (kind, size), members in alike.items():
        counts = {1, size // 3, size // 2} - {0, size}
        if all(_can_say(empty, families, [*passed, *members], count) for count in counts):
            passed += members
        else:
            why = f"uniform=True: the model's config cannot say every number of kept {kind} groups"
            refused.update(dict.fromkeys(members, why))
    return families.without(refused) if refused else families


def _can_say(empty: nn.Module, families: Families, members: Sequence[int], count: int) -> bool:
    """Whether the config can say that each of these families loses `count` groups."""
    subject = copied(empty)
    pruned = torch.zeros(families.num_groups, dtype=torch.bool)
    for f in members:
        family = families.families[f]
        pruned[family.first : family.first + min(count, family.size - 1)] = True
    return update_config(subject, remove_groups(subject, families, pruned)[1]) == 0
