"""Optimizers: ours, which step and shrink in one pass; which one owns a model; the penalty (Eq. 7-9)."""

from ocsfast.optim.adamw import AdamW
from ocsfast.optim.sgd import SGD

__all__ = ["SGD", "AdamW"]
