"""Random numbers in the proof: the same ones for a cut model and for the whole one.

What is drawn for an index that goes would shift all later draws, so nothing is drawn. An operator gives
its expectation, or numbers that differ from sample to sample alone. None of them is zero, which would
hide a wrong label on what they are multiplied by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ocsfast.grouping.trace.nodes import by_name

# In the first sample and in the others: on both sides of most thresholds, so that `rand_like(x) > 0.5`
# keeps one sample and drops another.
PerSample = tuple[float, float]
UNIFORM, NORMAL = (0.3, 0.7), (0.6, -0.9)
Drawn = PerSample | Tensor | float


def _uniform(given: dict[str, Any]) -> Drawn:
    low, width = given["from"], given["to"] - given["from"]
    return low + UNIFORM[0] * width, low + UNIFORM[1] * width


def _normal(given: dict[str, Any]) -> Drawn:
    mean, std = given["mean"], given["std"]
    if isinstance(mean, Tensor) or isinstance(std, Tensor):
        return mean + NORMAL[0] * std  # type: ignore[no-any-return]
    return mean + NORMAL[0] * std, mean + NORMAL[1] * std


def _bernoulli(given: dict[str, Any]) -> Drawn:
    """The probabilities. One number for all is that of a dropout, which then keeps everything."""
    probability = given.get("p", given["self"])
    return probability if isinstance(probability, Tensor) else 1.0


def _dirichlet(given: dict[str, Any]) -> Drawn:
    return given["self"] / given["self"].sum(-1, keepdim=True)  # type: ignore[no-any-return]


# By the operator's name without the underscore of its in-place form; from its arguments by name.
DRAWS: dict[str, Callable[[dict[str, Any]], Drawn]] = {
    **dict.fromkeys(("rand", "rand_like"), lambda _: UNIFORM),
    **dict.fromkeys(("randn", "randn_like"), lambda _: NORMAL),
    "uniform": _uniform,
    **dict.fromkeys(("normal", "normal_functional"), _normal),
    "bernoulli": _bernoulli,
    **dict.fromkeys(("poisson", "_standard_gamma"), lambda given: given["self"]),
    "binomial": lambda given: given["count"] * given["prob"],
    "_sample_dirichlet": _dirichlet,
    **dict.fromkeys(("exponential", "cauchy", "log_normal", "geometric"), lambda _: 1.0),
    **dict.fromkeys(("randint", "randint_like"), lambda given: given.get("low", 0)),
    "random": lambda given: given.get("from", 0),
}


def settled(operator: Any, args: Any, kwargs: dict[str, Any], samples: int) -> Any:
    """What an operator gives instead of random numbers; NotImplemented where it draws none.

    Args:
        operator: an aten overload.
        args, kwargs: its arguments.
        samples: numbers differ along dim 0 where it has this size.
    """
    name = operator._opname
    base = name.removesuffix("_")
    if base in ("native_dropout", "_fused_dropout"):
        return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
    if base == "randperm":
        out = operator(*args, **kwargs)
        return out.copy_(torch.arange(len(out), device=out.device))
    if base not in DRAWS and base not in ("multinomial", "rrelu_with_noise"):
        return NotImplemented
    given = by_name(operator, args, kwargs)
    if base == "multinomial":  # the likeliest ones, again and again where more are asked for
        order = torch.sort(given["self"], dim=-1, descending=True, stable=True).indices
        return order[..., torch.arange(given["num_samples"], device=order.device) % order.shape[-1]]
    if base == "rrelu_with_noise":
        slope = (given["lower"] + given["upper"]) / 2
        leaky = torch.where(args[0] < 0, slope * args[0], args[0])
        return args[0].copy_(leaky) if name.endswith("_") else leaky
    value = DRAWS[base](given)
    out = operator(*args, **kwargs)
    if isinstance(value, Tensor):
        return out.copy_(value)
    out.fill_(value[0] if isinstance(value, tuple) else value)
    if isinstance(value, tuple) and out.shape[:1] == (samples,):
        out[1:] = value[1]
    return out
