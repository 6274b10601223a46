"""Measured times of a model's operators, as a record that is saved, sent and read by people.

It names operators and sizes only, so that a run on one machine can prune for the latency of another.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from ocsfast.core.errors import ConfigError

FORMAT = "ocsfast latency"
VERSION = 1
MOST = 10**15  # nanoseconds, some eleven days: far below what the cost model's integers hold

Self = TypeVar("Self", bound="LatencyRecord")


@dataclass(frozen=True)
class Extent:
    """One side of an entry's table: a width of the operator, and the numbers of it that were measured.

    Attributes:
        tensor: Which of the operator's tensors has this width, by its number: arguments first, each
            once, then results.
        dim: Along which of its dimensions.
        kept: The numbers of indices measured, ascending; the last is all that the dense model has.

    Examples:
        >>> Extent(tensor=1, dim=0, kept=(16, 32, 64)).kept[-1]  # a convolution's output channels
        64
    """

    tensor: int
    dim: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """Times of one operator at several widths; all calls of it with the same arguments share them.

    Attributes:
        operator: Its name, as "aten.conv2d.default".
        nodes: The calls of it in the model's graph, by name.
        shapes: Of the tensors among its arguments, in the dense model.
        rows: The width along the rows of `nanoseconds`; None where they are one.
        cols: The same along its columns.
        nanoseconds: What one call takes, [rows][columns]; with more kept it never gets less.

    Examples:
        >>> widths = Extent(0, 1, (32, 64))
        >>> entry = Entry("aten.relu.default", ("relu",), ((8, 64),), widths, None, ((5,), (9,)))
        >>> entry.nanoseconds[-1][-1]
        9
    """

    operator: str
    nodes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    rows: Extent | None
    cols: Extent | None
    nanoseconds: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class LatencyRecord:
    """What `LatencyTable` holds.

    Raises:
        ConfigError: a value that no measurement gives; the message names the entry.
    """

    device: str
    dtype: str
    memory_format: str
    threads: int
    torch: str
    example: tuple[tuple[int, ...], ...]
    dense: int
    spread: float
    rest: int
    entries: tuple[Entry, ...] = field(repr=False)

    def __post_init__(self) -> None:
        """Check every number, and make sequences tuples."""
        for name in ("device", "dtype", "memory_format", "torch"):
            _require(isinstance(getattr(self, name), str), name, getattr(self, name), "a text")
        _require(_is_count(self.threads, 1), "threads", self.threads, "a whole number of at least 1")
        for name in ("dense", "rest"):
            value = getattr(self, name)
            _require(_is_count(value, int(name == "dense")), name, value, "whole nanoseconds")
        fine = isinstance(self.spread, (int, float)) and math.isfinite(self.spread) and self.spread >= 0
        _require(fine, "spread", self.spread, "a share of at least 0")
        object.__setattr__(self, "example", _shapes("example", self.example))
        entries = tuple(_checked_entry(entry) for entry in self.entries)
        if not entries:
            raise ConfigError("the latency table has no entries: nothing was measured")
        object.__setattr__(self, "entries", entries)
        names = [node for entry in entries for node in entry.nodes]
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise ConfigError(f"the latency table has {twice[0]} in two entries")
        total = self.rest + sum(entry.nanoseconds[-1][-1] * len(entry.nodes) for entry in entries)
        if total != self.dense:
            raise ConfigError(
                f"the latency table's dense is {self.dense}, but its rest and the times of all calls at "
                f"their full widths sum to {total}: make them equal"
            )

    def says(self) -> str:
        """What it is of, for people."""
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.example)
        threads = f", {self.threads} threads" if self.threads > 1 else ""
        return f"{self.device}{threads}, {self.dtype}, {self.memory_format}, inputs {shapes}"

    def plain(self) -> dict[str, Any]:
        """The record as texts, numbers, lists and dicts."""
        return {"format": FORMAT, "version": VERSION, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_plain(cls: type[Self], value: Any) -> Self:
        """The inverse of `plain`.

        Raises:
            ConfigError: it is not what `plain` returns.
        """
        if not isinstance(value, Mapping) or value.get("format") != FORMAT:
            raise ConfigError(f"this is no latency table: its format is not {FORMAT!r}")
        if value.get("version") != VERSION:
            raise ConfigError(
                f"the latency table has version {value.get('version')!r}, here it is {VERSION}: measure "
                "anew"
            )
        wanted = {one.name for one in fields(LatencyRecord)}
        given = set(value) - {"format", "version"}
        if given != wanted:
            name = min(given ^ wanted)
            raise ConfigError(
                f"the latency table {'lacks' if name in wanted else 'has an unknown field'} {name!r}"
            )
        try:
            entries = tuple(_entry(entry) for entry in value["entries"])
        except (TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"the latency table's entries are not as they should be: {error!r}"
            ) from error
        return cls(**{**{name: value[name] for name in wanted}, "entries": entries})

    def save(self, path: str | PathLike[str]) -> None:
        """Write it to a file, as JSON.

        Args:
            path: of the file; what is there is replaced.
        """
        lines = self.plain()
        entries = ",\n".join(f"    {json.dumps(entry)}" for entry in lines.pop("entries"))
        head = "\n".join(f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in lines.items())
        Path(path).write_text(f'{{\n{head}\n  "entries": [\n{entries}\n  ]\n}}\n', encoding="utf-8")

    @classmethod
    def load(cls: type[Self], path: str | PathLike[str]) -> Self:
        """Read a file that `save` wrote, or that was written by hand.

        Args:
            path: of the file.

        Raises:
            ConfigError: it is no such file, or holds a value that no measurement gives.
        """
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as a latency table: {error}") from error
        try:
            return cls.from_plain(value)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def _entry(value: Mapping[str, Any]) -> Entry:
    def extent(side: Mapping[str, Any] | None) -> Extent | None:
        return None if side is None else Extent(side["tensor"], side["dim"], tuple(side["kept"]))

    unknown = sorted(set(value) - {one.name for one in fields(Entry)})
    if unknown:
        raise ConfigError(f"the latency table's entry {value['operator']} has an unknown {unknown[0]!r}")
    if not isinstance(value["nodes"], list):
        raise TypeError(f"nodes={value['nodes']!r}: a list is expected")
    return Entry(
        value["operator"],
        tuple(value["nodes"]),
        _shapes(value["operator"], value["shapes"]),
        extent(value["rows"]),
        extent(value["cols"]),
        tuple(tuple(row) for row in value["nanoseconds"]),
    )


def _checked_entry(entry: Entry) -> Entry:
    """The entry, if its table is one that a measurement could give."""
    if not entry.nodes or not all(isinstance(node, str) for node in entry.nodes):
        raise ConfigError(f"the latency table's entry {entry.operator} names no calls (nodes)")
    where = f"{entry.operator} ({', '.join(entry.nodes[:2])}{' ...' if len(entry.nodes) > 2 else ''})"
    for name, side in (("rows", entry.rows), ("cols", entry.cols)):
        if side is None:
            continue
        counts = side.kept and all(_is_count(n, 1) for n in side.kept)
        if not counts or not all(a < b for a, b in pairwise(side.kept)):
            raise ConfigError(f"{where}: {name} {list(side.kept)} are not whole numbers that rise")
        _require(_is_count(side.tensor, 0) and _is_count(side.dim, 0), where, side, "a place")
    wanted = tuple(1 if side is None else len(side.kept) for side in (entry.rows, entry.cols))
    table = entry.nanoseconds
    if len(table) != wanted[0] or any(len(row) != wanted[1] for row in table):
        raise ConfigError(
            f"{where}: {wanted[0]} x {wanted[1]} times are expected, one for each pair of kept numbers; "
            f"here are {len(table)} rows of {sorted({len(row) for row in table})}"
        )
    for row in table:
        for value in row:
            _require(_is_count(value, 0), where, value, "whole nanoseconds, of at least 0")
    falls = any(a > b for row in table for a, b in pairwise(row)) or any(
        a > b for above, row in pairwise(table) for a, b in zip(above, row, strict=True)
    )
    if falls:
        raise ConfigError(
            f"{where}: with more kept it takes less time, which the search for a budget cannot use: "
            "make the times rise along rows and columns"
        )
    return entry


def _shapes(name: str, value: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    try:
        shapes = tuple(tuple(shape) for shape in value)
    except TypeError:
        shapes = ((-1,),)
    for shape in shapes:
        _require(all(_is_count(n, 0) for n in shape), name, value, "shapes")
    return shapes


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST


def _require(fine: bool, name: str, value: object, wanted: str) -> None:
    if not fine:
        raise ConfigError(f"the latency table's {name}: {value!r} is not {wanted}")
