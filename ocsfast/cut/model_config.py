"""Bringing the `config` of a transformers model in line with what a cut has left of the model.

Nothing says which field of a config sets which size, so it is found by trying. A config is right if a
model that is built from it has the shapes of the cut model. It is built on the meta device, which needs
no memory and no initialisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

Integer = tuple[Any, str, "int | None"]  # a config, the name of one of its fields, the field's value

# If layers shrink by more different ratios than this, one number of heads cannot describe them all. None
# is tried then, because each try builds a model.
MOST_RATIOS = 8


def describes_itself(model: nn.Module) -> bool:
    """Whether the model can be built anew from its `config`, as transformers models can."""
    config = getattr(model, "config", None)
    return config is not None and hasattr(config, "to_dict") and hasattr(type(model), "from_pretrained")


def update_config(model: nn.Module, became: Mapping[int, set[int]]) -> int:
    """Set the sizes in a model's config to what they are now, if it can describe the cut model at all.

    Otherwise the config stays as it was: one that is right in part would describe neither the cut model
    nor the dense one, which `ocsfast.load` needs.

    Args:
        model: a cut model that `describes_itself`.
        became: for each size that a dimension or an attribute had before the cut, the sizes it has now.

    Returns:
        How many dimensions of a model built from the best config differ from the cut model's. With 0,
        `save_pretrained` and `from_pretrained` work; otherwise the config is unchanged.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    config: Any = model.config
    most = sum(map(len, wanted.values())) + 1  # the count for a config that no model can be built from
    misfits = _misfits(model, config, wanted, most)
    before = integers_of(config)
    # Twice, because the right value of one field may only be recognised once another field is right.
    for _ in range(2):
        for part, name, value in integers_of(config):
            best = value
            for size in _candidates(name, value, became) if misfits else ():
                setattr(part, name, size)
                now = _misfits(model, config, wanted, most)
                if now < misfits:
                    misfits, best = now, size
            setattr(part, name, best)
    if misfits:
        set_integers(before)
    return misfits


def integers_of(config: Any) -> list[Integer]:
    """Every integer field of a config and of the configs inside it.

    Also fields that are None and have the name of a size: transformers derives these from other fields.
    """
    found: list[Integer] = []
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if type(value) is int or (
            value is None and any(part in name for part in ("inner", "dim", "size"))
        ):
            found.append((config, name, value))
        elif hasattr(value, "to_dict"):
            found += integers_of(value)
    return found


def set_integers(fields: Iterable[Integer]) -> None:
    """Set fields back to the values that `integers_of` has read."""
    for part, name, value in fields:
        setattr(part, name, value)


def _candidates(name: str, value: int | None, became: Mapping[int, set[int]]) -> list[int]:
    """The values that a field may need now, the likely ones first."""
    if value is None:
        return sorted(set().union(*became.values()))
    exact = became.get(value, set()) - {value}
    if not name.endswith(("heads", "n_head")):
        return sorted(exact)
    # A number of heads need not be the size of any dimension, but it shrinks by the ratio of one. The
    # shapes cannot tell half of the heads from heads of half the width, so only numbers are scaled.
    scaled = {
        value * new // old
        for old, sizes in became.items()
        for new in sizes
        if old and value * new % old == 0
    }
    scaled -= exact | {0, value}
    return sorted(exact) + (sorted(scaled) if len(scaled) <= MOST_RATIOS else [])


def _misfits(model: nn.Module, config: Any, wanted: Mapping[str, torch.Size], most: int) -> int:
    """How many dimensions of a model built from the config differ from `wanted`.

    `most` if no model of the same structure can be built.
    """
    try:
        anew = type(config).from_dict(config.to_dict())  # this checks its fields
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            built = type(model)(anew)
    except Exception:  # models raise many things on sizes that do not go together
        return most
    shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    if shapes.keys() != wanted.keys():
        return most
    return sum(
        a != b for name, shape in wanted.items() for a, b in zip(shapes[name], shape, strict=True)
    )
