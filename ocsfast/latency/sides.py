"""Along which widths an operator's time is measured: at most two, its sides.

Dimensions with the same groups in the same proportion are one side: a convolution's output channels are
dim 0 of its weight, its bias and dim 1 of its result; the heads of a query and of the keys that serve
several of them are one side too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ocsfast.core.families import Families, Operation

# Operators that compute products: both their sides count. Of others those of the largest tensor do.
PRODUCTS = ("conv", "linear", "mm", "matmul", "addmm", "bmm", "einsum", "scaled_dot_product_attention")

Profile = tuple[tuple[int, int], ...]  # (family, or -1 for what stays, its indices along a dimension)


@dataclass(frozen=True, eq=False)
class Side:
    """A width that some of an operator's dimensions have in common.

    Attributes:
        tensor, dim: the place with the most indices, in whose numbers the side is counted.
        labels: the group of each index there.
        unit: as many indices go or stay together.
        fixed: indices that never go.
        families: whose groups these are.
        spans: of each place on this side, (tensor, dim) -> its size.
    """

    tensor: int
    dim: int
    labels: Tensor
    unit: int
    fixed: int
    families: tuple[int, ...]
    spans: dict[tuple[int, int], int]

    @property
    def size(self) -> int:
        """How many indices there are while nothing is cut."""
        return self.labels.numel()


class Profiles:
    """Of each vector of groups, how many indices each family has; worked out once."""

    def __init__(self, families: Families) -> None:
        self._families = families
        self._known: dict[int, Profile | None] = {}
        self._held: list[Tensor] = []  # so that no id is given twice

    def of(self, labels: Tensor) -> Profile | None:
        """The profile; None where groups of one family have unequal numbers of indices."""
        key = id(labels)
        if key not in self._known:
            self._known[key] = self._counted(labels)
            self._held.append(labels)
        return self._known[key]

    def _counted(self, labels: Tensor) -> Profile | None:
        free = int((labels < 0).sum())
        if free == labels.numel():
            return None
        profile = [(-1, free)] if free else []
        for f, count in self._families.indices_of_groups(labels).items():
            if count is None:
                return None
            profile.append((f, count))
        return tuple(profile)


def is_product(operator: str) -> bool:
    """Whether an operator, as "aten.conv2d.default", computes products."""
    name = operator.split(".")[1] if "." in operator else operator
    return any(part in name.strip("_") for part in PRODUCTS)


def sides_of(operation: Operation, profiles: Profiles) -> tuple[Side, ...]:
    """The sides of an operator, the outputs of a product first; none where nothing of it may go."""
    places: dict[Profile, dict[tuple[int, int], Tensor]] = {}
    for t, dims in enumerate(operation.groups):
        for d, labels in enumerate(dims):
            profile = None if labels is None else profiles.of(labels)
            if labels is not None and profile is not None:
                places.setdefault(_reduced(profile), {})[t, d] = labels
    if not places:
        return ()

    def reach(key: Profile) -> tuple[bool, int]:
        """Whether the result has this side, and the size of the largest tensor with it."""
        own = places[key]
        last = len(operation.shapes) - 1
        return any(t == last for t, _ in own), max(math.prod(operation.shapes[t]) for t, _ in own)

    if is_product(operation.operator):
        chosen = sorted(places, key=reach, reverse=True)[:2]
    else:
        most = max(reach(key)[1] for key in places)
        chosen = [key for key in places if reach(key)[1] == most][:2]
    sides = []
    for key in chosen:
        own = places[key]
        (tensor, dim), labels = max(own.items(), key=lambda place: place[1].numel())
        profile = profiles.of(labels)
        assert profile is not None  # those without one have no place
        counts = {family: count for family, count in profile if family >= 0}
        fixed, unit = labels.numel() - int((labels >= 0).sum()), math.gcd(*counts.values())
        spans = {place: vector.numel() for place, vector in own.items()}
        sides.append(Side(tensor, dim, labels, unit, fixed, tuple(counts), spans))
    return tuple(sides)


def _reduced(profile: Profile) -> Profile:
    """The same for all profiles that are proportional to each other."""
    common = math.gcd(*(count for _, count in profile))
    return tuple((family, count // common) for family, count in profile)
