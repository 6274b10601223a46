"""Keeping a model's own description true: the `config` of a transformers model after a cut.

Which field says what is not written anywhere, so it is found by trying: a config is true if a model
built from it (on the meta device: no memory, no initialisation) has the shapes of the cut one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

Integer = tuple[Any, str, "int | None"]  # a config, the name of a field of it, its value

# Where layers shrink in more ways, no one number of heads says them all: that is not worth the trying.
MOST_RATIOS = 8


def describes_itself(model: nn.Module) -> bool:
    """Whether the model's class builds from its `config`, as those of transformers do."""
    config = getattr(model, "config", None)
    return config is not None and hasattr(config, "to_dict") and hasattr(type(model), "from_pretrained")


def update_config(model: nn.Module, became: Mapping[int, set[int]]) -> int:
    """Set the config's sizes to what they are now, or leave it as it is where it cannot say all of them.

    A config that is right in part would be that of no model: neither the cut nor the dense one, which
    `ocsfast.load` needs.

    Args:
        model: a cut model that `describes_itself`.
        became: for each size that a dimension or an attribute had before the cut, those it has now.

    Returns:
        How many dimensions of a model built from the best config still differ from the cut model's. If
        none does, `save_pretrained` and `from_pretrained` work; else the config is unchanged.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    config: Any = model.config
    most = sum(map(len, wanted.values())) + 1  # what a config counts for that builds no model at all
    misfits = _misfits(model, config, wanted, most)
    before = integers_of(config)
    # Twice, because the right value of one field may show only once another one is right.
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
    """Every integer field of a config and of the configs in it; also sizes that are None: derived."""
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
    """Set them to what they were when `integers_of` read them."""
    for part, name, value in fields:
        setattr(part, name, value)


def _candidates(name: str, value: int | None, became: Mapping[int, set[int]]) -> list[int]:
    """What a field may have to say now, likely values first."""
    if value is None:
        return sorted(set().union(*became.values()))
    exact = became.get(value, set()) - {value}
    if not name.endswith(("heads", "n_head")):
        return sorted(exact)
    # No dimension need have the size of a number of heads, but some shrink as it does. Only a number:
    # the shapes do not tell half of the heads from heads of half the width.
    scaled = {
        value * new // old
        for old, sizes in became.items()
        for new in sizes
        if old and value * new % old == 0
    }
    scaled -= exact | {0, value}
    return sorted(exact) + (sorted(scaled) if len(scaled) <= MOST_RATIOS else [])


def _misfits(model: nn.Module, config: Any, wanted: Mapping[str, torch.Size], most: int) -> int:
    """How many dimensions of a model built from the config are not as wanted."""
    try:
        anew = type(config).from_dict(config.to_dict())  # which checks what it holds
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            built = type(model)(anew)
    except Exception:  # whatever is raised on sizes that do not go together
        return most
    shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    if shapes.keys() != wanted.keys():
        return most
    return sum(
        a != b for name, shape in wanted.items() for a, b in zip(shapes[name], shape, strict=True)
    )
