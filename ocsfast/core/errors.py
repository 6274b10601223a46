"""The exceptions of ocsfast. Each is raised before anything has been changed."""


class OcsfastError(Exception):
    """Base of every error ocsfast raises on purpose."""


class ConfigError(OcsfastError, ValueError):
    """An argument or option has a value that cannot be used."""


class GroupingError(OcsfastError, RuntimeError):
    """The model's structure could not be found, or could not be proved."""


class StateError(OcsfastError, RuntimeError):
    """The model, the optimizer or the run is not in the state a call needs."""


class CheckpointError(OcsfastError, RuntimeError):
    """A file does not hold what it should, or does not fit the model."""


class GroupingTimeout(GroupingError):
    """Finding or proving the groups took longer than it may."""
