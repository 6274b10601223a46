"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """Write a file whole or not at all.

    Write to the path that the context yields. When the context ends, that file is flushed to the disk
    and takes the place of `path` in one step. A process that is killed before then leaves the old file
    as it was, and a hidden .tmp file beside it.

    Args:
        path: the file to write or to replace. Its folder must exist.

    Yields:
        The path of a temporary file in the same folder, which does not exist yet.

    Raises:
        IsADirectoryError: `path` is a folder.
        OSError: the file cannot be written. What is raised inside the context is passed on. In both
            cases the old file is left as it was, and the temporary file is removed.

    Examples:
        >>> import os, tempfile, torch, ocsfast
        >>> folder = tempfile.mkdtemp()
        >>> path = os.path.join(folder, "run.pt")
        >>> with ocsfast.replacing(path) as part:
        ...     torch.save({"epoch": 3}, part)
        >>> torch.load(path)
        {'epoch': 3}
        >>> os.listdir(folder)
        ['run.pt']
    """
    target = os.path.abspath(os.fspath(path))
    if os.path.isdir(target):
        raise IsADirectoryError(f"{target} is a folder")
    folder, name = os.path.split(target)
    # A rename is one step only within a folder. The process number tells whose file was left behind.
    part = os.path.join(folder, f".{name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield part
        _flush(part)
        os.replace(part, target)
        _flush(folder)
    finally:
        if os.path.exists(part):
            os.unlink(part)


def _flush(path: str) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
