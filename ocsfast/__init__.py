"""ocsfast: train, prune and finish a network in one training run."""

from ocsfast import optim
from ocsfast.api.as_graph import as_graph
from ocsfast.api.checkpoint import fit_on_load, load, save
from ocsfast.api.files import replacing
from ocsfast.api.inspection import FamilyFacts, Inspection, inspect
from ocsfast.api.latency import LatencyTable
from ocsfast.api.pruner import Pruner
from ocsfast.api.step import attach, detach, group, step
from ocsfast.core.config import Config
from ocsfast.core.errors import CheckpointError, ConfigError, GroupingError, OcsfastError, StateError
from ocsfast.core.families import Families, Frozen, Lookup, Product
from ocsfast.cut.optimizer_state import register_slicer
from ocsfast.cut.removal import cut_model
from ocsfast.grouping.rules.registry import register_rule
from ocsfast.integrations import detection
from ocsfast.run.report import StepReport

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "Families",
    "FamilyFacts",
    "Frozen",
    "GroupingError",
    "Inspection",
    "LatencyTable",
    "Lookup",
    "OcsfastError",
    "Product",
    "Pruner",
    "StateError",
    "StepReport",
    "__version__",
    "as_graph",
    "attach",
    "cut_model",
    "detach",
    "detection",
    "fit_on_load",
    "group",
    "inspect",
    "load",
    "optim",
    "register_rule",
    "register_slicer",
    "replacing",
    "save",
    "step",
]
