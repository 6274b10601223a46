"""What a model knows of its cut: how much it cost before, and what it costs now.

The record is a plain dict among the model's attributes, so that copies and pickles of the model carry
it. `ocsfast.save` writes it into the file, and a transformers model's `config` holds it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ocsfast.model_config import describes_itself

TARGETS = ("flops", "params", "bytes")  # what a cost may be of

ATTRIBUTE = "_ocsfast_cut"
IN_CONFIG = "ocsfast_cut"

Record = Mapping[
    str, Any
]  # {"dense": costs by target, "left": the same, "kept": [[family, kept, size]]}


def record_of(model: nn.Module) -> Record | None:
    """The record of a model that was cut; None for a dense one."""
    known: Record | None = vars(model).get(ATTRIBUTE)
    if known is None and describes_itself(model):
        said: Any = getattr(model.config, IN_CONFIG, None)
        # A dense model may share the config, a teacher for instance: it has more parameters.
        if is_record(said) and said["left"]["params"] == sum(p.numel() for p in model.parameters()):
            known = said
    return known


def mark(holder: Any, record: Record | None, name: str = ATTRIBUTE) -> Callable[[], None]:
    """Let a model, or a config, know of a cut, or with None of none. Returns what takes that back."""
    held = vars(holder)
    before = held.get(name)

    def put(value: Record | None) -> None:
        if value is None:
            held.pop(name, None)
        else:
            held[name] = dict(value)

    put(record)
    return lambda: put(before)


def is_record(value: Any) -> bool:
    """Whether what a file holds is one."""
    try:
        return set(value) == {"dense", "left", "kept"} and all(
            isinstance(value[part][name], int) and value[part][name] > 0
            for part in ("dense", "left")
            for name in TARGETS
        )
    except (TypeError, KeyError):
        return False
