"""Where a module's tensors are placed, whole or sharded, and what a cut of it uses accordingly.

`shards` is imported only for a sharded module, because torch's DTensor takes a second to import.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import nn

from ocsfast.cut.agreement import raised_together
from ocsfast.cut.layout import Layout, is_sharded


def layout_of(module: nn.Module) -> Layout:
    """The layout of a module's tensors.

    Raises:
        StateError: the module is sharded, and this version of torch keeps unknown records of it.
    """
    if not is_sharded(module):
        return Layout()
    from ocsfast.cut.shards import ShardedLayout

    return ShardedLayout(module)


def agreement(module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Makes contexts in which an error of one process is raised in all that hold parts of the module.

    For a module that is whole in this process, the contexts do nothing.

    Raises:
        StateError: as for `layout_of`.
    """
    if not is_sharded(module):
        return nullcontext
    from ocsfast.cut.shards import process_group_of

    process_group = process_group_of(module)
    return nullcontext if process_group is None else partial(raised_together, process_group)
