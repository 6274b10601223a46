"""By how many groups families shrink: their units, of which kept counts are multiples.

A matrix kernel computes so many outputs at once, and a few more cost as much as all of the next ones. Of
`conv2d` on a CPU with registers of 16 floats 17 outputs take as long as 32 (docs/performance.md has the
stairs); tensor cores want rows of 16 bytes, 8 numbers of half precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ocsfast.core.families import Families

# What is computed at once where nothing else is known: of half precision by tensor cores, of float32 by
# AVX2's registers.
USUAL = 8
WIDEST = {"AVX512": 16}
# A family of fewer units could hardly lose any: its unit is halved until it has so many.
LEAST_UNITS = 4


def multiple_for(round_to: int | str, device: torch.device) -> int:
    """The multiple that kept counts are to have: as given, or with "auto" what suits a device."""
    if isinstance(round_to, int):
        return round_to
    return WIDEST.get(torch.backends.cpu.get_cpu_capability(), USUAL) if device.type == "cpu" else USUAL


def units_of(
    families: Families,
    parameters: Mapping[str, Tensor],
    round_to: int | str,
    multiple: int,
    ties: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """How many groups each family loses at a time.

    With an integer `round_to` so many, whatever a group is. With "auto" a multiple is of outputs: a head
    of 64 is one already. It is smaller in a family of few groups.

    Args:
        round_to: `Config.round_to`.
        multiple: what `multiple_for` says of it, or a power of two below that.
        ties: the first family that each is tied to, or itself; tied ones have one unit.
    """
    if round_to == "auto":
        found = [
            _unit(multiple // math.gcd(multiple, count), family.size)
            for family, count in zip(families.families, _outputs(families, parameters), strict=True)
        ]
        if ties is not None:
            found = [max(u for u, t in zip(found, ties, strict=True) if t == first) for first in ties]
    else:
        found = [multiple for _ in families.families]
    return tuple(math.lcm(unit, families.multiple) for unit in found)


def _unit(unit: int, size: int) -> int:
    while unit > 1 and size < LEAST_UNITS * unit:
        unit //= 2
    return unit


def _outputs(families: Families, parameters: Mapping[str, Tensor]) -> list[int]:
    """By family, how many outputs of a layer one group is: a channel is one, a head is several.

    The dimensions of heads count as one, since each head has so many fewer.
    """
    counts = [0 for _ in families.families]
    for axis in families.axes:
        weight = parameters.get(axis.tensor)
        if axis.axis == 0 and weight is not None and weight.ndim > 1:
            for f, count in families.indices_of_groups(axis.groups).items():
                counts[f] = math.gcd(counts[f], count or 1)
    return [
        1 if family.kind == "head_dim" else count or 1
        for family, count in zip(families.families, counts, strict=True)
    ]
