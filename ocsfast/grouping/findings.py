"""What is known of a model once its graphs have been run on labels; `assembly` makes families of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ocsfast.grouping.labels import Dims, Labels, Vector


@dataclass(frozen=True, eq=False)
class RawProduct:
    """A cost before the labels are solved: coefficient * the kept sizes of these dimensions, in MACs."""

    coefficient: int
    vectors: tuple[Vector | None, ...]
    sizes: tuple[int, ...]
    where: str  # the module that costs this
    batched: bool  # whether it depends on the inputs, and so grows with the number of samples


@dataclass(frozen=True, eq=False)
class RawOperation:
    """A call of an operator before the labels are solved; see `families.Operation`."""

    node: str
    operator: str
    where: str
    shapes: tuple[tuple[int, ...], ...]
    vectors: tuple[Dims, ...]


@dataclass(eq=False)
class Findings:
    """What is found in one or several graphs of a model. Names of attributes are (module, name)."""

    labels: Labels = field(default_factory=Labels)
    # Labels of each parameter and buffer, by its first name.
    state: dict[str, Dims] = field(default_factory=dict)
    # (tensor, axis) of every weight axis that holds a layer's output channels. A dict, for its order.
    producers: dict[tuple[str, int], None] = field(default_factory=dict)
    # What each integer attribute of a module counts; None where it counts what never goes.
    attributes: dict[tuple[str, str], Vector | None] = field(default_factory=dict)
    # Integer attributes that the code of a graph used.
    read: set[tuple[str, str]] = field(default_factory=set)
    # By module: labels of the tensors that its own code makes.
    made: dict[str, list[Vector]] = field(default_factory=dict)
    # (in the graph of training mode?, node, dimension, labels) of every operator that runs over what is
    # left of a dimension, as an average does.
    statistics: list[tuple[bool, str, int, Vector]] = field(default_factory=list)
    # Dimensions that a softmax or an extreme runs over: the first to stay where too many could shrink.
    spare: list[Vector] = field(default_factory=list)
    # By kind of group ("head", ...): labels that are known to be of that kind.
    kinds: dict[str, list[Vector]] = field(default_factory=dict)
    products: list[RawProduct] = field(default_factory=list)
    operations: list[RawOperation] = field(default_factory=list)
    # Place of each operator without a rule -> its name.
    unknown: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)  # parameters and buffers that some operator reads
    multiple: int = 1  # every kept count must be a multiple of it, because some operator demands it
    apart: str = ""  # place of a layer that runs once for all of dim 0, which so is no batch
