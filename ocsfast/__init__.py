"""ocsfast: train, prune and finish a network in one training run."""

from ocsfast import detection, optim
from ocsfast.api import attach, detach, group, step
from ocsfast.as_graph import as_graph
from ocsfast.checkpoint import load, save
from ocsfast.config import Config
from ocsfast.cut import cut_model
from ocsfast.errors import CheckpointError, ConfigError, GroupingError, OcsfastError, StateError
from ocsfast.fitting import fit_on_load
from ocsfast.grouping.propagate import register_rule
from ocsfast.history import StepReport
from ocsfast.inspection import FamilyFacts, Inspection, inspect
from ocsfast.pruner import Pruner
from ocsfast.slicing import register_slicer

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "FamilyFacts",
    "GroupingError",
    "Inspection",
    "OcsfastError",
    "Pruner",
    "StateError",
    "StepReport",
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
    "save",
    "step",
]
