"""One call of the library, checked: the ratio and the options that it gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cached_property
from numbers import Real
from typing import Any

from ocsfast.core.config import LENGTHS, PLAN, Config, make_config
from ocsfast.core.errors import ConfigError


@dataclass(frozen=True)
class Call:
    """The ratio and the options of a call.

    Raises:
        ConfigError: the ratio is no number between 0 and 1.
    """

    ratio: float
    config: Config | None
    keywords: Mapping[str, Any]  # fields of `Config`, which override `config`

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", checked_ratio(self.ratio))

    @cached_property
    def options(self) -> Config:
        """All options; not worked out where a loop repeats its call after every optimizer step.

        Raises:
            ConfigError: one is unknown, or has a bad value.
        """
        return options_of(self.config, self.keywords)

    def asks_anew(self, first: Call) -> bool:
        """Whether it asks for a further cut than that of the first call, by name."""
        return self.ratio != first.ratio and self.options.again

    def require_same(self, first: Call, *, finished: bool) -> None:
        """Refuse another ratio than the first call's, or other options; options need not be repeated.

        Args:
            finished: whether the cut is made, so that the run's length decides nothing any longer.

        Raises:
            ConfigError: naming what differs.
        """
        if self.ratio != first.ratio:
            way = (
                "The model is cut: again=True cuts it further"
                if finished
                else "It cannot change in mid-run: call ocsfast.detach(model) to start anew"
            )
            raise ConfigError(
                f"ratio={self.ratio!r} differs from ratio={first.ratio!r} of the first call. {way}"
            )
        given = (self.config, self.keywords)
        if given in ((None, {}), (first.config, first.keywords)):
            return
        then, now = first.options, self.options
        names = [f.name for f in fields(Config) if getattr(then, f.name) != getattr(now, f.name)]
        changed = [name for name in names if not (finished and name in PLAN)]
        if changed:
            raise ConfigError(
                f"{', '.join(changed)}: not as in the first call; options cannot change in mid-run. "
                "Call ocsfast.detach(model) to start anew"
            )


def options_of(config: Config | None, keywords: Mapping[str, Any]) -> Config:
    """The options of a call; a length in keywords takes the place of whichever one `config` holds.

    Raises:
        ConfigError: an unknown option, or a bad value.
    """
    options = make_config(dict(keywords))
    if config is None:
        return options
    said = any(keywords.get(name) is not None for name in LENGTHS)
    return replace(config, **{**(dict.fromkeys(LENGTHS) if said else {}), **keywords})


def checked_ratio(ratio: float) -> float:
    """`ratio` as a float strictly between 0 and 1: the share of the target that is removed.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, Real):
        raise ConfigError(f"ratio={ratio!r}: a number between 0 and 1 is expected")
    if 0 < ratio < 1:
        return float(ratio)
    if math.isnan(ratio):
        raise ConfigError("ratio is NaN: it is the share of the target to remove, between 0 and 1")
    if 1 < ratio < 2:
        hint = f" (did you mean {float(Fraction(str(ratio)) - 1):g}?)"
    elif 2 <= ratio < 100:
        hint = f" (did you mean {ratio / 100:g}?)"
    else:
        hint = ""
    raise ConfigError(
        f"ratio={ratio:g} must lie between 0 and 1, both excluded: "
        f"it is the share of the target that is removed{hint}"
    )
