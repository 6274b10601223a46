"""Why layers stay dense, in a sentence: how many for which reason, and what would free them."""

from __future__ import annotations

from ocsfast.core.families import NOT_USED, Families
from ocsfast.grouping.proof.trials import CUT_FAILS

# Of each kind of reason: words in it, what its layers are called, and what frees them. The first kind
# whose words occur in a reason counts.
_KINDS = (
    (
        "requires_grad=False",
        "frozen (requires_grad=False)",
        "unfreeze them, or call ocsfast.step only from the epoch in which they train (to resume a run, "
        "attach before they are frozen)",
    ),
    ("keep=", "held by keep=", "shorten keep="),
    ("only=", "left out by only=", "name more in only="),
    ("kinds=", "left out by kinds=", "name more in kinds="),
    ("uniform=", "left out by uniform=True", "go without uniform=True"),
    (NOT_USED, "not used by the example inputs", "pass example_inputs= that use them"),
    (CUT_FAILS, "of a width that the model's code fixes", "try ocsfast.as_graph"),
    ("no rule for", "before operators without a rule", "teach these with ocsfast.register_rule"),
    ("left behind in", "left behind by the forward pass", "name the outputs that count in outputs="),
    ("computed but not", "computed but not returned", "pass inputs that both modes take"),
    ("model output", "model output", ""),
    ("", "held by other operators", "see ocsfast.inspect"),
)


def why_dense(families: Families) -> tuple[str, list[str]]:
    """How many layers stay dense for which kind of reason, and what would free them.

    Returns:
        "3 layers stay dense: 2 frozen (requires_grad=False), 1 model output", and the ways out.
    """
    counted: dict[tuple[str, str], set[str]] = {}
    for entry in families.frozen:
        if entry.reason.startswith("no rule for") and "(" not in entry.reason:
            continue  # this entry names the operator, not a layer
        where = entry.where.rpartition(".")[0] if entry.reason == NOT_USED else entry.where
        kind = next((called, way) for holds, called, way in _KINDS if holds in entry.reason)
        counted.setdefault(kind, set()).add(where)
    if not counted:
        return "no layer stays dense", []
    layers = len(set().union(*counted.values()))
    kinds = ", ".join(f"{len(counted[c, w])} {c}" for _, c, w in _KINDS if (c, w) in counted)
    ways = [way for _, called, way in _KINDS if way and (called, way) in counted]
    return f"{layers} layer{' stays' if layers == 1 else 's stay'} dense: {kinds}", ways


def one_of(ways: list[str]) -> str:
    """Ways out, joined to end a sentence: "a, b, or c"."""
    return ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])}, or {ways[-1]}"
