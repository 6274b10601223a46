"""What a model knows of its cut: how much it cost before, and what it costs now.

The record is a plain dict among the model's attributes, so that copies and pickles of the model carry
it. `ocsfast.save` writes it into the file, and a transformers model's `config` holds it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ocsfast.cost import TARGETS, build_cost_model, target_products
from ocsfast.grouping.families import Families
from ocsfast.model_config import describes_itself

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


def make_record(
    families: Families, left: Families, parameters: Mapping[str, Tensor], before: Record | None
) -> dict[str, Any]:
    """The record of a cut.

    Args:
        families, left: of the model before the cut and after it.
        parameters: as they were before the cut.
        before: the record of an earlier cut of the same model: dense is what was dense then.
    """
    sizes = [family.size for family in families.families]
    counts = [family.size for family in left.families]
    dense, now = {}, {}
    for target in TARGETS:
        products, unit = target_products(target, families, parameters)
        cost = build_cost_model(families, products, unit)
        dense[target], now[target] = cost(sizes), cost(counts)
        if before is not None:
            dense[target] = dense_cost(before, target, dense[target])
    kept = [[f.name, n, f.size] for f, n in zip(families.families, counts, strict=True)]
    return {"dense": dense, "left": now, "kept": kept}


def dense_cost(record: Record | None, target: Any, now: int) -> int:
    """What the dense model cost of which a cut one costs `now`: MACs scale with the size of the input.

    A target of the user's own scales as FLOPs do. Without a record, the model is the dense one.
    """
    if record is None:
        return now
    name = target if isinstance(target, str) and target in TARGETS else "flops"
    return now * int(record["dense"][name]) // max(1, int(record["left"][name]))


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
